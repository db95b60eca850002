//! The client of a guest that is just coming up: it waits for envd and calls `POST /init`.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::EnvdError;
use super::http1::{connect, exchange};
use crate::{ACCESS_TOKEN_HEADER, GuestMetrics, InitRequest};

/// Pause before a refused connection is tried again, so that a guest under emulation is not
/// kept busy with refusing.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_MOST: Duration = Duration::from_millis(100);

/// When a SYN has had no answer for so long, another connection is begun beside it: a SYN sent
/// to a paused guest waits in its queue and is the fastest, but a lost one is repeated by the
/// kernel only after a second.
const HEDGE: Duration = Duration::from_millis(400);

/// Answers and error texts of envd are short; more is not read.
const MAX_ANSWER_BYTES: usize = 16 << 10;

/// Brings up the envd of one guest.
#[derive(Debug, Clone)]
pub struct EnvdClient {
    address: SocketAddr,
    host: String,
    token: Option<String>,
}

impl EnvdClient {
    /// A client of envd at `address`. `access_token` is the token that envd holds **now**: none
    /// for a guest that was saved without one.
    #[must_use]
    pub fn new(address: SocketAddr, access_token: Option<String>) -> Self {
        Self { address, host: address.to_string(), token: access_token }
    }

    /// Tells envd who the guest is. Waits for envd to come up: tries again as long as it is
    /// refused or reset, until `limit` from now. Where the request has a time, it is set anew when a
    /// connection stands: the guest's clock is not to lag by the wait for its envd.
    ///
    /// # Errors
    /// [`EnvdError::Deadline`] when envd did not answer in time; [`EnvdError::Status`] when it
    /// refused (401: wrong token; 500: the clock or the entropy could not be set).
    pub async fn init(&self, request: &InitRequest, limit: Duration) -> Result<(), EnvdError> {
        let mut request = request.clone();
        let mut body = || {
            request.timestamp = request.timestamp.map(|_| Utc::now());
            let body = serde_json::to_vec(&request);
            body.map(Bytes::from)
                .map_err(|e| EnvdError::Request { what: "POST /init".into(), reason: e.to_string() })
        };
        self.until("POST /init", Method::POST, "/init", &mut body, Instant::now() + limit, limit).await
    }

    /// Waits until envd answers `GET /health`, at most `limit` from now.
    ///
    /// # Errors
    /// [`EnvdError::Deadline`] when it does not.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), EnvdError> {
        let mut body = || Ok(Bytes::new());
        self.until("GET /health", Method::GET, "/health", &mut body, Instant::now() + limit, limit).await
    }

    /// Asks once, and waits for an answer at most `limit`.
    ///
    /// # Errors
    /// When there is no answer, or one that is no success.
    pub async fn health(&self, limit: Duration) -> Result<(), EnvdError> {
        self.once("GET /health", "/health", limit).await.map(|_| ())
    }

    /// Asks once for the guest's figures, and waits for them at most `limit`. They are the guest's word.
    ///
    /// # Errors
    /// When there is no answer, one that is no success, or one that is not what envd says.
    pub async fn metrics(&self, limit: Duration) -> Result<GuestMetrics, EnvdError> {
        let what = "GET /metrics";
        let body = self.once(what, "/metrics", limit).await?;
        serde_json::from_slice(&body).map_err(|e| EnvdError::Status {
            what: what.into(),
            status: 200,
            message: format!("which is not its figures: {e}"),
        })
    }

    /// One `GET`, without a second try.
    async fn once(
        &self,
        what: &'static str,
        path: &'static str,
        limit: Duration,
    ) -> Result<Bytes, EnvdError> {
        let once = async {
            let stream = connect(&self.host).await.map_err(|e| self.refused(e))?;
            self.call(stream, what, Method::GET, path, Bytes::new()).await
        };
        tokio::time::timeout(limit, once).await.unwrap_or_else(|_| Err(self.late(what, limit, None)))
    }

    async fn until(
        &self,
        what: &'static str,
        method: Method,
        path: &'static str,
        body: &mut (dyn FnMut() -> Result<Bytes, EnvdError> + Send),
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), EnvdError> {
        let mut last = None;
        let mut pause = RETRY_FIRST;
        loop {
            let attempt = async {
                let stream = self.connect_hedged().await.map_err(|e| self.refused(e))?;
                self.call(stream, what, method.clone(), path, body()?).await
            };
            match timeout_at(deadline, attempt).await {
                Err(_) => return Err(self.late(what, limit, last)),
                Ok(Err(e @ (EnvdError::Connect { .. } | EnvdError::Http { .. }))) => {
                    last = Some(e.to_string());
                }
                Ok(done) => return done.map(|_| ()),
            }
            if timeout_at(deadline, sleep(pause)).await.is_err() {
                return Err(self.late(what, limit, last));
            }
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    /// The first of several connections, one begun every [`HEDGE`].
    async fn connect_hedged(&self) -> io::Result<TcpStream> {
        let mut attempts = FuturesUnordered::new();
        loop {
            attempts.push(connect(&self.host));
            let next = HEDGE * attempts.len() as u32;
            tokio::select! {
                done = attempts.next() => match done {
                    Some(done) => return done,
                    None => continue,
                },
                () = sleep(next) => {}
            }
        }
    }

    async fn call(
        &self,
        stream: TcpStream,
        what: &'static str,
        method: Method,
        path: &'static str,
        body: Bytes,
    ) -> Result<Bytes, EnvdError> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, &self.host);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(token).map_err(|_| EnvdError::Request {
                what: what.into(),
                reason: "the access token is no header value".into(),
            })?;
            request = request.header(ACCESS_TOKEN_HEADER, value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|e| EnvdError::Request { what: what.into(), reason: e.to_string() })?;
        let mut exchange = exchange(stream, &self.host, request).await?;
        let status = exchange.response.status();
        if status == StatusCode::NO_CONTENT {
            return Ok(Bytes::new());
        }
        let body = exchange
            .collect(MAX_ANSWER_BYTES)
            .await
            .map_err(|source| EnvdError::Http { address: self.host.clone(), source })?;
        if status == StatusCode::OK {
            return Ok(body.bytes.into());
        }
        Err(EnvdError::Status {
            what: what.into(),
            status: status.as_u16(),
            message: String::from_utf8_lossy(&body.bytes).trim().to_owned(),
        })
    }

    fn refused(&self, source: io::Error) -> EnvdError {
        EnvdError::Connect { address: self.address.to_string(), source }
    }

    fn late(&self, what: &'static str, limit: Duration, last: Option<String>) -> EnvdError {
        EnvdError::Deadline { address: self.host.clone(), what, limit, last }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn init_goes_on_through_resets_until_it_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = EnvdClient::new(listener.local_addr().unwrap(), Some("old".into()));
        let server = tokio::spawn(async move {
            drop(listener.accept().await.unwrap());
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut seen = vec![0; 4096];
            let n = stream.read(&mut seen).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            String::from_utf8(seen[..n].to_vec()).unwrap()
        });
        let request = InitRequest { access_token: Some("new".into()), ..InitRequest::default() };
        client.init(&request, Duration::from_secs(20)).await.unwrap();
        let seen = server.await.unwrap();
        assert!(seen.starts_with("POST /init HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains("x-access-token: old"), "{seen}");
        assert!(seen.ends_with(r#"{"accessToken":"new"}"#), "{seen}");
    }

    #[tokio::test]
    async fn figures_are_bounded_in_size_and_time_and_garbage_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = EnvdClient::new(listener.local_addr().unwrap(), None);
        let answer = |head: &str, body: &str| {
            format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        };
        let answers = [
            answer("200 OK", r#"{"cpu_count":2,"cpu_used_pct":12.5,"mem_total":7,"ts":1}"#),
            answer("200 OK", "[1"),
            answer("401 Unauthorized", "no"),
            format!(
                "HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n{{\"cpu_count\":1}}{}",
                " ".repeat(1 << 20)
            ),
            "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".to_owned(),
        ];
        let server = tokio::spawn(async move {
            let mut open = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = vec![0; 4096];
                let _ = stream.read(&mut seen).await.unwrap();
                let _ = stream.write_all(answer.as_bytes()).await;
                open.push(stream);
            }
            open
        });
        let limit = Duration::from_secs(20);
        let got = client.metrics(limit).await.unwrap();
        assert_eq!((got.cpu_count, got.cpu_used_pct, got.mem_total, got.disk_used), (2, 12.5, 7, 0));
        assert!(matches!(client.metrics(limit).await, Err(EnvdError::Status { status: 200, .. })));
        assert!(matches!(client.metrics(limit).await, Err(EnvdError::Status { status: 401, .. })));
        // As much as is read, which is the beginning and spaces.
        assert_eq!(client.metrics(limit).await.unwrap().cpu_count, 1);
        assert!(matches!(client.metrics(Duration::from_millis(200)).await, Err(EnvdError::Deadline { .. })));
        drop(server.await.unwrap());
    }

    #[tokio::test]
    async fn the_time_is_that_of_the_attempt() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = EnvdClient::new(listener.local_addr().unwrap(), None);
        let server = tokio::spawn(async move {
            let mut times = Vec::new();
            for answer in ["", "HTTP/1.1 204 No Content\r\n\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = vec![0; 4096];
                let n = stream.read(&mut seen).await.unwrap();
                let text = String::from_utf8(seen[..n].to_vec()).unwrap();
                let sent: InitRequest = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
                times.push(sent.timestamp.unwrap());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            times
        });
        let long_ago = chrono::DateTime::UNIX_EPOCH;
        let request = InitRequest { timestamp: Some(long_ago), ..InitRequest::default() };
        client.init(&request, Duration::from_secs(20)).await.unwrap();
        let times = server.await.unwrap();
        assert!(long_ago < times[0] && times[0] < times[1], "{times:?}");
    }

    #[tokio::test]
    async fn a_refusal_by_envd_is_final_and_says_why() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = EnvdClient::new(listener.local_addr().unwrap(), None);
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut seen = vec![0; 4096];
            assert_ne!(stream.read(&mut seen).await.unwrap(), 0);
            stream.write_all(b"HTTP/1.1 401 U\r\ncontent-length: 5\r\n\r\nwrong").await.unwrap();
        });
        let error = client.init(&InitRequest::default(), Duration::from_secs(20)).await.unwrap_err();
        server.await.unwrap();
        assert_eq!(error.to_string(), "envd answered POST /init with status 401: wrong");
    }

    #[tokio::test]
    async fn nobody_there_ends_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = EnvdClient::new(address, None).wait_ready(Duration::from_millis(60)).await.unwrap_err();
        assert!(matches!(error, EnvdError::Deadline { last: Some(_), .. }), "{error}");
    }
}
