//! The HTTP client: a connection of its own for each request, so that one that was cancelled
//! half-way leaves nothing for the next to trip over.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;

use super::Call;

/// Most bytes of an answer; the largest that is known, MMDS contents, is at most 50 KiB by default.
const ANSWER_LIMIT: usize = 1 << 20;
/// Most characters of an error text.
const TEXT_LIMIT: usize = 2000;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// No connection, or one that broke: the process is ending or gone.
    #[error("{call}: the API connection was lost: {reason}")]
    Lost {
        /// Method and path.
        call: String,
        /// The cause.
        reason: String,
    },
    /// Firecracker refused.
    #[error("{call} was refused ({status}): {fault_message}")]
    Refused {
        /// Method and path.
        call: String,
        /// HTTP status.
        status: u16,
        /// Firecracker's sentence.
        fault_message: String,
    },
    /// Something that is not Firecracker's API.
    #[error("{call}: {reason}")]
    Malformed {
        /// Method and path.
        call: String,
        /// What is wrong.
        reason: String,
    },
}

/// Body of an answer that is an error.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// A client of one Firecracker.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    // Keeps the path good when it names a descriptor.
    _socket: Option<OwnedFd>,
}

impl Client {
    /// The API at a path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), _socket: None }
    }

    /// The API at a socket that was opened with O_PATH.
    pub fn of_socket(socket: OwnedFd) -> Self {
        let path = Path::new("/proc/self/fd").join(socket.as_raw_fd().to_string());
        Self { path, _socket: Some(socket) }
    }

    /// Whether the API takes connections.
    pub async fn answers(&self) -> bool {
        UnixStream::connect(&self.path).await.is_ok()
    }

    /// Sends a request and returns its answer.
    ///
    /// # Errors
    /// [`ApiError`]
    pub async fn send<C: Call>(&self, call: &C) -> Result<C::Answer, ApiError> {
        let path = call.path();
        let name = || format!("{} {path}", C::METHOD);
        let lost = |e: &dyn std::fmt::Display| ApiError::Lost { call: name(), reason: e.to_string() };
        let malformed =
            |e: &dyn std::fmt::Display| ApiError::Malformed { call: name(), reason: e.to_string() };
        let mut request = Request::builder().method(C::METHOD).uri(path.as_ref());
        request = request.header(header::HOST, "localhost").header(header::ACCEPT, "application/json");
        let mut body = Full::default();
        if C::BODY {
            request = request.header(header::CONTENT_TYPE, "application/json");
            body = Full::new(Bytes::from(serde_json::to_vec(call).map_err(|e| malformed(&e))?));
        }
        let request = request.body(body).map_err(|e| malformed(&e))?;
        let stream = UnixStream::connect(&self.path).await.map_err(|e| lost(&e))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| lost(&e))?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|e| lost(&e))?;
            let status = answer.status();
            let body =
                Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await.map_err(|e| lost(&e))?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(exchange, connection);
        let (status, body) = tokio::select! {
            biased;
            r = &mut exchange => r?,
            r = &mut connection => match r {
                // Closed after the answer.
                Ok(()) => exchange.await?,
                Err(e) => return Err(lost(&e)),
            },
        };
        if status.is_success() {
            let text: &[u8] = if body.is_empty() { b"null" } else { &body };
            return serde_json::from_slice(text)
                .map_err(|e| malformed(&format!("an answer of another form: {e}")));
        }
        Err(ApiError::Refused { call: name(), status: status.as_u16(), fault_message: fault(status, &body) })
    }
}

fn fault(status: StatusCode, body: &[u8]) -> String {
    let text = match serde_json::from_slice::<Fault>(body) {
        Ok(f) => f.fault_message,
        Err(_) if body.is_empty() => status.to_string(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    text.trim().chars().take(TEXT_LIMIT).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;
    use crate::firecracker::api::{BootSource, DescribeInstance, GetVersion};

    /// Answers one request with the bytes; returns what it was asked.
    async fn exchange<C: Call>(call: &C, answer: &'static str) -> (Result<C::Answer, ApiError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let server = async {
            let (mut s, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let n = s.read(&mut request).await.unwrap();
            s.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..n]).into_owned()
        };
        let client = Client::new(&path);
        tokio::join!(client.send(call), server)
    }

    #[tokio::test]
    async fn a_request_has_its_method_path_and_json() {
        let boot = BootSource {
            kernel_image_path: "/kernel".into(),
            initrd_path: None,
            boot_args: Some("a=b".into()),
        };
        let (result, request) = exchange(&boot, "HTTP/1.1 204 No Content\r\n\r\n").await;
        result.unwrap();
        assert!(request.starts_with("PUT /boot-source HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("content-type: application/json\r\n"), "{request}");
        let body = request.split("\r\n\r\n").nth(1).unwrap();
        assert_eq!(body, r#"{"kernel_image_path":"/kernel","boot_args":"a=b"}"#);
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n{\"firecracker_version\": \"1.16.1\"}";
        let (result, request) = exchange(&GetVersion, answer).await;
        assert_eq!(result.unwrap().firecracker_version, "1.16.1");
        assert!(
            request.starts_with("GET /version HTTP/1.1\r\n") && request.ends_with("\r\n\r\n"),
            "{request}"
        );
    }

    #[tokio::test]
    async fn a_refusal_carries_firecrackers_sentence() {
        let answer =
            "HTTP/1.1 400 Bad Request\r\nContent-Length: 34\r\n\r\n{\"fault_message\":\"No such file.\"}\n";
        let (result, _) = exchange(&DescribeInstance, answer).await;
        let e = result.unwrap_err();
        assert_eq!(e.to_string(), "GET / was refused (400): No such file.");
        let (result, _) = exchange(&DescribeInstance, "HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n").await;
        assert!(matches!(result, Err(ApiError::Refused { status: 500, .. })));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        let (result, _) = exchange(&DescribeInstance, "").await;
        assert!(matches!(result, Err(ApiError::Lost { .. })), "{result:?}");
        let (result, _) = exchange(&DescribeInstance, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await;
        assert!(matches!(result, Err(ApiError::Malformed { .. })), "{result:?}");
        let huge = "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n";
        let (result, _) = exchange(&DescribeInstance, huge).await;
        assert!(matches!(result, Err(ApiError::Lost { .. })), "{result:?}");
        let nowhere = Client::new("/nonexistent/api");
        assert!(!nowhere.answers().await);
        assert!(matches!(nowhere.send(&DescribeInstance).await, Err(ApiError::Lost { .. })));
    }
}
