//! Connect calls: unary, and with a stream of answers.

use std::marker::PhantomData;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;

use super::EnvdError;
use super::http1::{Exchange, connect, exchange};
use crate::ACCESS_TOKEN_HEADER;
use crate::connect::{Code, Codec, ConnectError, Decoder, Envelope, MAX_MESSAGE_BYTES, Rpc, frame};

/// Calls of one guest's envd, directly or through a sandbox proxy. Each call has its own
/// connection, so the client is only an address and headers, cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    authority: String,
    prefix: String,
    headers: HeaderMap,
    codec: Codec,
}

impl Client {
    /// A client of envd at this address.
    #[must_use]
    pub fn direct(address: SocketAddr) -> Self {
        Self {
            authority: address.to_string(),
            prefix: String::new(),
            headers: HeaderMap::new(),
            codec: Codec::Proto,
        }
    }

    /// A client that goes through `base_url`, which must be plain http (`http://host[:port][/path]`).
    ///
    /// # Errors
    /// When the URL is of another form.
    pub fn new(base_url: &str) -> Result<Self, EnvdError> {
        let wrong =
            |reason: &str| EnvdError::Request { what: base_url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = base_url.parse().map_err(|_| wrong("this is not a URL"))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong("only http:// URLs can be called"));
        }
        let host = uri.host().ok_or_else(|| wrong("the URL has no host"))?;
        Ok(Self {
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            headers: HeaderMap::new(),
            codec: Codec::Proto,
        })
    }

    /// A client of a sandbox's envd behind the sandbox proxy at `base_url`.
    ///
    /// # Errors
    /// When the URL is not plain http, or an argument is no header value.
    pub fn of_sandbox(base_url: &str, sandbox_id: &str, token: Option<&str>) -> Result<Self, EnvdError> {
        let client = Self::new(base_url)?
            .header("e2b-sandbox-id", sandbox_id)?
            .header("e2b-sandbox-port", &crate::ENVD_PORT.to_string())?;
        match token {
            Some(token) => client.access_token(token),
            None => Ok(client),
        }
    }

    /// Sends this header with every call.
    ///
    /// # Errors
    /// When name or value is not one that HTTP allows.
    pub fn header(mut self, name: &str, value: &str) -> Result<Self, EnvdError> {
        let wrong =
            |reason: &str| EnvdError::Request { what: format!("header {name}"), reason: reason.to_owned() };
        let name = HeaderName::try_from(name).map_err(|_| wrong("not a header name"))?;
        let value = HeaderValue::from_str(value).map_err(|_| wrong("not a header value"))?;
        self.headers.insert(name, value);
        Ok(self)
    }

    /// Sends this access token with every call.
    ///
    /// # Errors
    /// When it is no header value.
    pub fn access_token(self, token: &str) -> Result<Self, EnvdError> {
        self.header(ACCESS_TOKEN_HEADER, token)
    }

    /// Uses this codec; otherwise protobuf's binary form.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Calls `procedure` (such as `process.Process/List`) and waits for its one answer.
    ///
    /// # Errors
    /// [`EnvdError::Rpc`] when it failed in envd.
    pub async fn unary<A: Rpc, B: Rpc>(&self, procedure: &str, argument: &A) -> Result<B, EnvdError> {
        let body = self.encode(procedure, argument)?;
        let request = self.request(procedure, self.codec.unary_type(), None, Full::new(body))?;
        let mut exchange = self.send(request).await?;
        let status = exchange.response.status();
        let body = exchange.collect(MAX_MESSAGE_BYTES).await.map_err(|e| self.broken(e))?;
        if status != StatusCode::OK {
            return Err(refusal(procedure, status, &body.bytes));
        }
        if body.truncated {
            return Err(EnvdError::TooLarge { what: procedure.to_owned(), limit: MAX_MESSAGE_BYTES });
        }
        self.decode(procedure, &body.bytes)
    }

    /// Calls `procedure` with one argument and gives the stream of its answers. `headers` are
    /// sent beside the client's own.
    ///
    /// # Errors
    /// When the call cannot be made; what fails in envd shows in the stream.
    pub async fn stream<A: Rpc, B: Rpc>(
        &self,
        procedure: &str,
        argument: &A,
        headers: Option<HeaderMap>,
    ) -> Result<MessageStream<B>, EnvdError> {
        let body = frame(&self.encode(procedure, argument)?);
        let request = self.request(procedure, self.codec.stream_type(), headers, Full::new(body))?;
        self.answers(procedure, request).await
    }

    /// Calls `procedure` with a stream of arguments and waits for its one answer.
    ///
    /// # Errors
    /// [`EnvdError::Rpc`] when it failed in envd.
    pub async fn client_stream<A: Rpc, B: Rpc>(
        &self,
        procedure: &str,
        arguments: impl Stream<Item = A> + Send + 'static,
    ) -> Result<B, EnvdError> {
        use futures::StreamExt;
        let codec = self.codec;
        let frames = arguments.map(move |a| codec.encode(&a).map(|m| Frame::data(frame(&m))));
        let body = BodyExt::boxed_unsync(StreamBody::new(frames));
        let request = self.request(procedure, codec.stream_type(), None, body)?;
        let mut answers: MessageStream<B> = self.answers(procedure, request).await?;
        let answer = answers.next().await?.ok_or_else(|| EnvdError::Incomplete(procedure.to_owned()))?;
        while answers.next().await?.is_some() {}
        Ok(answer)
    }

    async fn answers<B: Rpc, P>(
        &self,
        procedure: &str,
        request: Request<P>,
    ) -> Result<MessageStream<B>, EnvdError>
    where
        P: hyper::body::Body<Data = Bytes> + Send + 'static,
        P::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut exchange = self.send(request).await?;
        let status = exchange.response.status();
        if status != StatusCode::OK {
            let body = exchange.collect(MAX_MESSAGE_BYTES).await.map_err(|e| self.broken(e))?;
            return Err(refusal(procedure, status, &body.bytes));
        }
        Ok(MessageStream {
            exchange,
            decoder: Decoder::default(),
            codec: self.codec,
            procedure: procedure.to_owned(),
            address: self.authority.clone(),
            ended: false,
            kind: PhantomData,
        })
    }

    async fn send<P>(&self, request: Request<P>) -> Result<Exchange, EnvdError>
    where
        P: hyper::body::Body<Data = Bytes> + Send + 'static,
        P::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = connect(&self.authority)
            .await
            .map_err(|source| EnvdError::Connect { address: self.authority.clone(), source })?;
        exchange(stream, &self.authority, request).await
    }

    fn request<P>(
        &self,
        procedure: &str,
        content_type: &'static str,
        headers: Option<HeaderMap>,
        body: P,
    ) -> Result<Request<P>, EnvdError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/{procedure}", self.prefix))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, content_type)
            .header("connect-protocol-version", "1")
            .body(body)
            .map_err(|e| EnvdError::Request { what: procedure.to_owned(), reason: e.to_string() })?;
        request.headers_mut().extend(self.headers.clone());
        request.headers_mut().extend(headers.unwrap_or_default());
        Ok(request)
    }

    fn encode<A: Rpc>(&self, procedure: &str, argument: &A) -> Result<Bytes, EnvdError> {
        self.codec
            .encode(argument)
            .map_err(|e| EnvdError::Request { what: procedure.to_owned(), reason: e.to_string() })
    }

    fn decode<B: Rpc>(&self, procedure: &str, bytes: &[u8]) -> Result<B, EnvdError> {
        self.codec.decode(bytes).map_err(|source| EnvdError::Decode { what: procedure.to_owned(), source })
    }

    fn broken(&self, source: hyper::Error) -> EnvdError {
        EnvdError::Http { address: self.authority.clone(), source }
    }
}

/// Connect's error in the body of a response, or what an answer of something in between means.
fn refusal(procedure: &str, status: StatusCode, body: &[u8]) -> EnvdError {
    let error = serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&body[..body.len().min(1024)]);
        let message = serde_json::from_slice::<serde_json::Value>(body)
            .ok()
            .and_then(|v| v.get("message").and_then(|m| m.as_str().map(str::to_owned)))
            .unwrap_or_else(|| format!("status {status}: {}", text.trim()));
        ConnectError::new(Code::from_http_status(status.as_u16()), message)
    });
    EnvdError::Rpc { what: procedure.to_owned(), error }
}

/// The answers of a streaming call, in order. Dropping it ends the call.
pub struct MessageStream<M> {
    exchange: Exchange,
    decoder: Decoder,
    codec: Codec,
    procedure: String,
    address: String,
    ended: bool,
    kind: PhantomData<fn() -> M>,
}

impl<M: Rpc> MessageStream<M> {
    /// The next answer; `None` when the call is over and went well.
    ///
    /// # Errors
    /// [`EnvdError::Rpc`] when it failed in envd, [`EnvdError::Incomplete`] when the stream broke.
    pub async fn next(&mut self) -> Result<Option<M>, EnvdError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let envelope = self
                .decoder
                .take()
                .map_err(|source| EnvdError::Envelope { what: self.procedure.clone(), source })?;
            match envelope {
                Some(Envelope::Message(bytes)) => {
                    return self
                        .codec
                        .decode(&bytes)
                        .map(Some)
                        .map_err(|source| EnvdError::Decode { what: self.procedure.clone(), source });
                }
                Some(Envelope::End(end)) => {
                    self.ended = true;
                    if let Some(error) = end.error {
                        return Err(EnvdError::Rpc { what: self.procedure.clone(), error });
                    }
                }
                None => match self.exchange.data().await {
                    Some(Ok(data)) => self.decoder.push(&data),
                    Some(Err(source)) => {
                        return Err(EnvdError::Http { address: self.address.clone(), source });
                    }
                    None => return Err(EnvdError::Incomplete(self.procedure.clone())),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        let client = Client::of_sandbox("http://proxy.local:5007/x/", "i1", Some("t")).unwrap();
        let request = client.request("process.Process/List", "application/proto", None, ()).unwrap();
        assert_eq!(request.uri(), "/x/process.Process/List");
        assert_eq!(request.headers()["e2b-sandbox-id"], "i1");
        assert_eq!(request.headers()["e2b-sandbox-port"], "49983");
        assert_eq!(request.headers()["x-access-token"], "t");
        assert!(Client::new("https://a").unwrap_err().to_string().contains("only http"));
    }

    #[test]
    fn a_proxys_answer_becomes_an_error_with_its_message() {
        let body = br#"{"code":502,"message":"The sandbox was not found"}"#;
        let error = refusal("p", StatusCode::BAD_GATEWAY, body);
        assert_eq!(error.rpc(), Some(&ConnectError::new(Code::Unavailable, "The sandbox was not found")));
        let error = refusal("p", StatusCode::NOT_FOUND, br#"{"code":"not_found","message":"m"}"#);
        assert_eq!(error.rpc().unwrap().code, Code::NotFound);
    }
}
