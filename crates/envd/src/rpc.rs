//! Connect calls: unary, streams of responses, streams of requests (connectrpc.com/docs/protocol).

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use nidus_envd_protocol::KEEPALIVE_HEADER;
use nidus_envd_protocol::connect::{
    Code, Codec, ConnectError, Decoder, Envelope, MAX_MESSAGE_BYTES, Rpc, end_stream, frame,
};
use tokio::time::Instant;

use crate::body::{self, Body};
use crate::reply;
use crate::state::State;
use crate::users::{self, User};

/// Between keepalive events when the request does not say.
const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);
const MAX_KEEPALIVE: Duration = Duration::from_secs(3600);

/// What a call's headers say.
#[derive(Debug, Clone)]
pub struct Caller {
    user: Option<String>,
    /// When the call is to be over.
    pub deadline: Option<Instant>,
    /// Time between keepalive events of a stream.
    pub keepalive: Duration,
}

impl Caller {
    fn of(headers: &HeaderMap) -> Self {
        let number = |name| headers.get(name).and_then(|v| v.to_str().ok()?.trim().parse::<u64>().ok());
        let limit = number("connect-timeout-ms").filter(|ms| *ms > 0).map(Duration::from_millis);
        let keepalive = number(KEEPALIVE_HEADER).filter(|s| *s > 0).map(Duration::from_secs);
        Self {
            user: basic_user(headers),
            deadline: limit.and_then(|l| Instant::now().checked_add(l)),
            keepalive: keepalive.unwrap_or(DEFAULT_KEEPALIVE).min(MAX_KEEPALIVE),
        }
    }

    /// The user that the call names, or the default one.
    pub async fn user(&self, state: &State) -> Result<User, ConnectError> {
        let name = self.user.clone().unwrap_or_else(|| state.default_user());
        blocking(move || {
            users::by_name(&name).map_err(|e| {
                ConnectError::new(Code::Unauthenticated, format!("invalid username: '{name}': {e}"))
            })
        })
        .await
    }
}

/// `Authorization: Basic base64(user:)`; the password says nothing.
fn basic_user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (kind, coded) = value.split_once(' ')?;
    if !kind.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(coded.trim()).ok()?).ok()?;
    let name = text.split(':').next().unwrap_or_default();
    (!name.is_empty()).then(|| name.to_owned())
}

/// File work off the one thread.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
) -> Result<T, ConnectError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(ConnectError::new(Code::Internal, format!("the work did not finish: {e}"))))
}

fn content_type(headers: &HeaderMap) -> &str {
    headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

fn is_compressed(headers: &HeaderMap, name: &str) -> bool {
    headers.get(name).is_some_and(|v| !v.as_bytes().eq_ignore_ascii_case(b"identity"))
}

fn unsupported() -> Response<Body> {
    let mut response = reply::status(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let types = "application/json, application/proto, application/connect+json, application/connect+proto";
    response.headers_mut().insert("accept-post", HeaderValue::from_static(types));
    response
}

fn compressed() -> ConnectError {
    ConnectError::new(Code::Unimplemented, "compressed requests are not supported: identity only")
}

/// A call with one request and one response.
pub async fn unary<Q: Rpc, A: Rpc>(
    request: Request<Incoming>,
    work: impl AsyncFnOnce(Caller, Q) -> Result<A, ConnectError>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let Some(codec) = Codec::of_unary(content_type(&parts.headers)) else { return unsupported() };
    let caller = Caller::of(&parts.headers);
    let deadline = caller.deadline;
    let work = async {
        if is_compressed(&parts.headers, "content-encoding") {
            return Err(compressed());
        }
        let bytes = Limited::new(body, MAX_MESSAGE_BYTES)
            .collect()
            .await
            .map_err(|e| ConnectError::new(Code::InvalidArgument, format!("cannot read the request: {e}")))?
            .to_bytes();
        let message =
            codec.decode(&bytes).map_err(|e| ConnectError::new(Code::InvalidArgument, e.to_string()))?;
        let answer = work(caller, message).await?;
        codec.encode(&answer).map_err(|e| ConnectError::new(Code::Internal, e.to_string()))
    };
    let done = match deadline {
        Some(at) => tokio::time::timeout_at(at, work).await.unwrap_or_else(|_| Err(too_late())),
        None => work.await,
    };
    match done {
        Ok(bytes) => {
            let mut response = Response::new(body::full(bytes));
            let kind = HeaderValue::from_static(codec.unary_type());
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Err(e) => error(&e),
    }
}

/// A unary call's error.
pub fn error(e: &ConnectError) -> Response<Body> {
    let status = StatusCode::from_u16(e.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply::json(status, e)
}

/// The call's time is over.
pub fn too_late() -> ConnectError {
    ConnectError::new(Code::DeadlineExceeded, "the call's time is over")
}

/// Reads the envelopes of a request.
struct Requests {
    body: Incoming,
    decoder: Decoder,
}

impl Requests {
    async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        let bad = |e: String| ConnectError::new(Code::InvalidArgument, e);
        loop {
            match self.decoder.take().map_err(|e| bad(e.to_string()))? {
                Some(Envelope::Message(bytes)) => return Ok(Some(bytes)),
                Some(Envelope::End(_)) => return Ok(None),
                None => {}
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.decoder.push(data);
                    }
                }
                Some(Err(e)) => return Err(bad(format!("cannot read the request: {e}"))),
                None => {
                    self.decoder.finish().map_err(|e| bad(e.to_string()))?;
                    return Ok(None);
                }
            }
        }
    }
}

impl Requests {
    /// Reads what is left, which is no more than the body's end for a well-behaved client: an
    /// HTTP/1 connection whose request was not read to its end cannot be used again.
    async fn drain(mut self) {
        let mut left = MAX_MESSAGE_BYTES;
        while let Some(Ok(frame)) = self.body.frame().await {
            let size = frame.data_ref().map_or(0, Bytes::len);
            left = match left.checked_sub(size) {
                Some(left) => left,
                None => return,
            };
        }
    }
}

fn stream_response(
    codec: Codec,
    pieces: impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
) -> Response<Body> {
    // An error ends the stream, and the end always comes.
    let framed = stream::unfold(Some(Box::pin(pieces)), |pieces| async move {
        let mut pieces = pieces?;
        match pieces.next().await {
            Some(Ok(message)) => Some((Ok(frame(&message)), Some(pieces))),
            Some(Err(e)) => Some((Ok(end_stream(Some(e))), None)),
            None => Some((Ok(end_stream(None)), None)),
        }
    });
    let mut response = Response::new(body::stream(framed));
    let h = response.headers_mut();
    h.insert(header::CONTENT_TYPE, HeaderValue::from_static(codec.stream_type()));
    h.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A call with one request and a stream of responses.
pub async fn server_stream<Q: Rpc, A: Rpc, S>(
    request: Request<Incoming>,
    work: impl AsyncFnOnce(Caller, Q) -> Result<S, ConnectError>,
) -> Response<Body>
where
    S: Stream<Item = Result<A, ConnectError>> + Send + 'static,
{
    let (parts, body) = request.into_parts();
    let Some(codec) = Codec::of_stream(content_type(&parts.headers)) else { return unsupported() };
    let caller = Caller::of(&parts.headers);
    let mut requests = Requests { body, decoder: Decoder::default() };
    let started = async {
        if is_compressed(&parts.headers, "connect-content-encoding") {
            return Err(compressed());
        }
        let missing = || ConnectError::new(Code::InvalidArgument, "the request is missing");
        let bytes = requests.next().await?.ok_or_else(missing)?;
        let message =
            codec.decode(&bytes).map_err(|e| ConnectError::new(Code::InvalidArgument, e.to_string()))?;
        work(caller, message).await
    }
    .await;
    tokio::task::spawn_local(requests.drain());
    match started {
        Ok(events) => stream_response(
            codec,
            events.map(move |event| {
                codec.encode(&event?).map_err(|e| ConnectError::new(Code::Internal, e.to_string()))
            }),
        ),
        Err(e) => stream_response(codec, stream::iter([Err(e)])),
    }
}

/// A call with a stream of requests and one response.
pub async fn client_stream<Q: Rpc, A: Rpc>(
    request: Request<Incoming>,
    mut each: impl AsyncFnMut(Q) -> Result<(), ConnectError>,
    answer: A,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let Some(codec) = Codec::of_stream(content_type(&parts.headers)) else { return unsupported() };
    let mut requests = Requests { body, decoder: Decoder::default() };
    let done = async {
        if is_compressed(&parts.headers, "connect-content-encoding") {
            return Err(compressed());
        }
        while let Some(bytes) = requests.next().await? {
            let message =
                codec.decode(&bytes).map_err(|e| ConnectError::new(Code::InvalidArgument, e.to_string()))?;
            each(message).await?;
        }
        codec.encode(&answer).map_err(|e| ConnectError::new(Code::Internal, e.to_string()))
    }
    .await;
    stream_response(codec, stream::iter([done]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_a_call() {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static("Basic dXNlcjo="));
        headers.insert("connect-timeout-ms", HeaderValue::from_static("0"));
        headers.insert("keepalive-ping-interval", HeaderValue::from_static("50"));
        let caller = Caller::of(&headers);
        assert_eq!(caller.user.as_deref(), Some("user"));
        assert_eq!((caller.deadline, caller.keepalive), (None, Duration::from_secs(50)));
        headers.insert("authorization", HeaderValue::from_static("Bearer dXNlcjo="));
        assert_eq!(Caller::of(&headers).user, None);
    }
}
