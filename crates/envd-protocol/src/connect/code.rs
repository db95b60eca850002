//! Connect's error codes and their HTTP statuses.

use serde::{Deserialize, Serialize};

/// Why a call failed, as Connect and gRPC name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The caller gave up.
    Canceled,
    /// The request is wrong whatever the state of the system.
    InvalidArgument,
    /// Not done in time.
    DeadlineExceeded,
    /// What was named is not there.
    NotFound,
    /// What was to be made is there.
    AlreadyExists,
    /// The caller may not do this.
    PermissionDenied,
    /// A quota or a limit is used up.
    ResourceExhausted,
    /// The system is not in the state that the call needs.
    FailedPrecondition,
    /// Conflict with another call.
    Aborted,
    /// Past the end.
    OutOfRange,
    /// No such call.
    Unimplemented,
    /// A fault of ours.
    Internal,
    /// Try again later.
    Unavailable,
    /// Data was lost.
    DataLoss,
    /// The caller is not known.
    Unauthenticated,
    /// No better code is known.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// Status of a unary response that carries this error (Connect protocol, "Error Codes").
    #[must_use]
    pub fn http_status(self) -> u16 {
        match self {
            Self::Canceled => 499,
            Self::InvalidArgument | Self::FailedPrecondition | Self::OutOfRange => 400,
            Self::DeadlineExceeded => 504,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Aborted => 409,
            Self::PermissionDenied => 403,
            Self::ResourceExhausted => 429,
            Self::Unimplemented => 501,
            Self::Unavailable => 503,
            Self::Unauthenticated => 401,
            Self::Unknown | Self::Internal | Self::DataLoss => 500,
        }
    }

    /// Code of a response that is not Connect's, such as a proxy's (Connect protocol, "HTTP to
    /// Error Code").
    #[must_use]
    pub fn from_http_status(status: u16) -> Self {
        match status {
            400 => Self::Internal,
            401 => Self::Unauthenticated,
            403 => Self::PermissionDenied,
            404 => Self::Unimplemented,
            429 | 502 | 503 | 504 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

/// An error as Connect sends it: the JSON body of a unary response, or the `error` of an
/// end-of-stream message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    /// What kind of failure.
    pub code: Code,
    /// For people.
    #[serde(default)]
    pub message: String,
}

impl ConnectError {
    /// An error of this kind and text.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_connects_names() {
        let json = serde_json::to_string(&ConnectError::new(Code::InvalidArgument, "no")).unwrap();
        assert_eq!(json, r#"{"code":"invalid_argument","message":"no"}"#);
        let back: ConnectError = serde_json::from_str(r#"{"code":"made_up","details":[]}"#).unwrap();
        assert_eq!(back, ConnectError::new(Code::Unknown, ""));
        assert_eq!(serde_json::to_string(&Code::Unknown).unwrap(), r#""unknown""#);
    }

    #[test]
    fn statuses_are_connects() {
        assert_eq!(Code::AlreadyExists.http_status(), 409);
        assert_eq!(Code::Unauthenticated.http_status(), 401);
        assert_eq!(Code::from_http_status(502), Code::Unavailable);
        assert_eq!(Code::from_http_status(418), Code::Unknown);
    }
}
