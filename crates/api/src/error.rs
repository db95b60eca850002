//! Errors as clients get them: a status, and `{"code": …, "message": …}`.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::RETRY_AFTER;
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::StoreError;

/// Whether a client should send the same request again (E2B's SDKs).
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Status of the answer.
    pub status: StatusCode,
    /// For people.
    pub message: String,
    /// Whether the same request, sent again in a moment, may well succeed.
    pub again: bool,
}

impl ApiError {
    /// An error of this status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let again = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        Self { status, message: message.into(), again }
    }

    /// The same, and sending it again will not help: something else must happen first.
    #[must_use]
    pub fn for_good(mut self) -> Self {
        self.again = false;
        self
    }

    /// 400.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// What a client gets to read.
    pub fn body(&self) -> Value {
        json!({ "code": self.status.as_u16(), "message": self.message })
    }

    /// 501, for what E2B has and this version has not.
    pub fn not_yet(what: &str) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, format!("{what} is not supported by this version of Nidus"))
    }
}

impl From<Status> for ApiError {
    fn from(s: Status) -> Self {
        let status = match s.code() {
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
            Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let message = match s.code() {
            // What a transport says is not for clients.
            Code::Unavailable if s.message().contains("transport") || s.message().contains("connect") => {
                tracing::warn!("the node cannot be reached: {s}");
                "the node cannot be reached; try again".to_owned()
            }
            _ => s.message().to_owned(),
        };
        Self::new(status, message)
    }
}

impl From<StoreError> for ApiError {
    fn from(e: StoreError) -> Self {
        tracing::error!("{e}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the server's database could not be used")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        // SDKs retry on their own what says so, and by default what says nothing of it.
        if self.again {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("true"));
        } else if self.status == StatusCode::TOO_MANY_REQUESTS || self.status.is_server_error() {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_say_whether_to_come_again() {
        let of = |e: ApiError| {
            let r = e.into_response();
            let text = |n: &str| r.headers().get(n).map(|v| v.to_str().unwrap().to_owned());
            (text("should-retry"), text("retry-after"))
        };
        let (yes, no) = (Some("true".to_owned()), Some("false".to_owned()));
        assert_eq!(of(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "")), (yes, Some("1".to_owned())));
        assert_eq!(of(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "").for_good()), (no.clone(), None));
        assert_eq!(of(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "")), (no, None));
        assert_eq!(of(ApiError::bad("")), (None, None));
    }

    #[test]
    fn grpc_codes_become_statuses() {
        let of = |s: Status| ApiError::from(s).status.as_u16();
        assert_eq!(of(Status::not_found("")), 404);
        assert_eq!(of(Status::resource_exhausted("")), 429);
        assert_eq!(of(Status::unimplemented("")), 501);
        assert_eq!(of(Status::data_loss("")), 500);
        let e = ApiError::from(Status::unavailable("tcp connect error: 127.0.0.1"));
        assert!(e.status == 503 && !e.message.contains("127.0.0.1"), "{e}");
    }
}
