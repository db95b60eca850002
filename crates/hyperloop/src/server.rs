//! The listener of one sandbox.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use chrono::Utc;
use http::header::{CONTENT_TYPE, EXPECT, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nidus_telemetry::{GuestLogSink, LogOrigin};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::logs::{self, LogsError};
use crate::rate::Bucket;

/// A guest that sends slower than this is not waited for.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// What is read and thrown away of a body that is too long, in bytes: a client that is still sending when
/// the connection ends sees a reset and not the answer.
const THROWN_AWAY: usize = 16 << 20;

/// What one sandbox may send.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once; more wait.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Entries of a request.
    pub batch: usize,
    /// Entries a second on average; ten times as many at once.
    pub entries_per_second: u32,
    /// Bytes a second on average; ten times as many at once.
    pub bytes_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16,
            body_bytes: 1 << 20,
            batch: 1000,
            entries_per_second: 200,
            bytes_per_second: 256 << 10,
        }
    }
}

struct Rates {
    entries: Bucket,
    bytes: Bucket,
}

/// The service as one sandbox sees it.
pub struct Hyperloop {
    origin: Arc<LogOrigin>,
    sink: Arc<dyn GuestLogSink>,
    limits: Limits,
    rates: Mutex<Rates>,
}

impl Hyperloop {
    /// For the sandbox that `origin` names.
    pub fn new(origin: LogOrigin, sink: Arc<dyn GuestLogSink>, limits: Limits) -> Arc<Self> {
        let now = Instant::now();
        let bucket = |n: u32| Bucket::new(n, n.saturating_mul(10), now);
        let rates =
            Rates { entries: bucket(limits.entries_per_second), bytes: bucket(limits.bytes_per_second) };
        Arc::new(Self { origin: Arc::new(origin), sink, limits, rates: Mutex::new(rates) })
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/me") => {
                reply(StatusCode::OK, &json!({ "sandboxID": self.origin.sandbox_id }))
            }
            (&Method::POST, "/logs") => self.logs(request).await,
            (_, "/me" | "/logs") => {
                error(StatusCode::METHOD_NOT_ALLOWED, "GET /me and POST /logs are served")
            }
            _ => error(StatusCode::NOT_FOUND, "GET /me and POST /logs are served here, and nothing else"),
        }
    }

    async fn logs(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let limit = self.limits.body_bytes;
        let asks = request.headers().contains_key(EXPECT);
        let body = request.into_body();
        let too_long =
            || error(StatusCode::PAYLOAD_TOO_LARGE, &format!("a request has at most {limit} bytes"));
        // Whoever asks before sending has an answer without sending.
        if asks && body.size_hint().lower() > limit as u64 {
            return too_long();
        }
        let body = match tokio::time::timeout(REQUEST_TIME, at_most(body, limit)).await {
            Ok(Ok(Some(body))) => body,
            Ok(Ok(None)) => return too_long(),
            Ok(Err(e)) => return error(StatusCode::BAD_REQUEST, &format!("the request ended early: {e}")),
            Err(_) => return error(StatusCode::REQUEST_TIMEOUT, "the request did not come to its end"),
        };
        let entries = match logs::parse(&body, &self.origin, Utc::now(), self.limits.batch) {
            Ok(entries) => entries,
            Err(LogsError::Format(e)) => {
                return error(StatusCode::BAD_REQUEST, &format!("not log entries: {e}"));
            }
            Err(LogsError::Many(n)) => {
                return error(StatusCode::PAYLOAD_TOO_LARGE, &format!("a request has at most {n} entries"));
            }
        };
        if let Some(refused) = self.too_much(entries.len(), body.len()) {
            return refused;
        }
        for entry in &entries {
            self.sink.take(entry);
        }
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::OK;
        response
    }

    fn too_much(&self, entries: usize, bytes: usize) -> Option<Response<Full<Bytes>>> {
        let now = Instant::now();
        let mut rates = self.rates.lock();
        let taken = rates.bytes.take(bytes, now).and_then(|()| rates.entries.take(entries, now));
        let wait = taken.err()?;
        let mut response = error(
            StatusCode::TOO_MANY_REQUESTS,
            &format!(
                "more than {} entries or {} bytes a second",
                self.limits.entries_per_second, self.limits.bytes_per_second
            ),
        );
        let seconds = wait.map_or(1, |w| w.as_secs() + 1);
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        Some(response)
    }
}

/// The body, or none if it has more than `limit` bytes; then it was read to its end all the same, or to
/// [`THROWN_AWAY`].
async fn at_most(mut body: Incoming, limit: usize) -> hyper::Result<Option<Bytes>> {
    let (mut kept, mut read) = (BytesMut::new(), 0usize);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        read = read.saturating_add(data.len());
        if read <= limit {
            kept.extend_from_slice(&data);
        } else if read > THROWN_AWAY {
            break;
        } else {
            kept = BytesMut::new();
        }
    }
    Ok((read <= limit).then(|| kept.freeze()))
}

fn reply(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn error(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    reply(status, &json!({ "code": status.as_u16(), "message": message }))
}

/// Serves a sandbox's listener until `stop`; its connections end with it.
///
/// # Errors
/// Never for a single connection.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Hyperloop>,
    stop: CancellationToken,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(service.limits.connections));
    let tasks = TaskTracker::new();
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIME).max_buf_size(16 << 10);
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?.0, permit))
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            a = accepted => a,
        };
        let (stream, permit) = match accepted {
            Ok(a) => a,
            Err(e) => {
                tracing::warn!("cannot accept a guest's connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answer = {
            let service = service.clone();
            service_fn(move |request| {
                let service = service.clone();
                async move { Ok::<_, Infallible>(service.answer(request).await) }
            })
        };
        let connection = builder.serve_connection(TokioIo::new(stream), answer);
        let stop = stop.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                r = connection => {
                    if let Err(e) = r {
                        tracing::debug!("a guest's connection ended: {e}");
                    }
                }
            }
            drop(permit);
        });
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}
