//! Plain HTTP answers, outside Connect.

use http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::body::{self, Body};

/// An error of the HTTP part: status and a sentence.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct HttpError {
    /// Status of the answer.
    pub status: StatusCode,
    /// What went wrong.
    pub message: String,
}

impl HttpError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// As E2B's clients expect it: `{"code":404,"message":"…"}`.
    pub fn response(&self) -> Response<Body> {
        #[derive(Serialize)]
        struct Error<'a> {
            code: u16,
            message: &'a str,
        }
        json(self.status, &Error { code: self.status.as_u16(), message: &self.message })
    }
}

/// Status and nothing else.
pub fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(body::empty());
    *response.status_mut() = status;
    response
}

/// A JSON body.
pub fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let text = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(body::full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
