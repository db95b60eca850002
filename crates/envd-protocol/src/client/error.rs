//! What can go wrong between a client and envd.

use std::io;
use std::time::Duration;

use crate::connect::{ConnectError, DecodeError, EnvelopeError};

/// A call of envd that failed.
#[derive(Debug, thiserror::Error)]
pub enum EnvdError {
    /// No connection.
    #[error("cannot connect to envd at {address}: {source}")]
    Connect {
        /// Where to.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// envd was not there in time.
    #[error("envd at {address} did not answer {what} within {limit:?}{}", last.as_ref().map(|l| format!(" (last: {l})")).unwrap_or_default())]
    Deadline {
        /// Where.
        address: String,
        /// Which call.
        what: &'static str,
        /// The limit that was given.
        limit: Duration,
        /// What the last attempt failed with.
        last: Option<String>,
    },
    /// The connection broke, or what came back is no HTTP.
    #[error("the exchange with envd at {address} failed: {source}")]
    Http {
        /// Where.
        address: String,
        /// Why.
        source: hyper::Error,
    },
    /// An answer that is no success.
    #[error("envd answered {what} with status {status}: {message}")]
    Status {
        /// Which call.
        what: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The call failed in envd.
    #[error("envd refused {what}: {error}")]
    Rpc {
        /// Which procedure.
        what: String,
        /// Connect's error.
        error: ConnectError,
    },
    /// A message that is none.
    #[error("envd's answer to {what} cannot be read: {source}")]
    Decode {
        /// Which procedure.
        what: String,
        /// Why.
        source: DecodeError,
    },
    /// A stream that is none.
    #[error("envd's stream for {what} is broken: {source}")]
    Envelope {
        /// Which procedure.
        what: String,
        /// Why.
        source: EnvelopeError,
    },
    /// More than the limit.
    #[error("envd's answer to {what} is larger than {limit} bytes")]
    TooLarge {
        /// Which call.
        what: String,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The stream ended before its end message.
    #[error("envd's stream for {0} ended too early")]
    Incomplete(String),
    /// What the caller gave cannot be sent.
    #[error("cannot make the request {what}: {reason}")]
    Request {
        /// Which call or part.
        what: String,
        /// Why not.
        reason: String,
    },
}

impl EnvdError {
    /// Connect's error, when the call reached envd and failed there.
    #[must_use]
    pub fn rpc(&self) -> Option<&ConnectError> {
        match self {
            Self::Rpc { error, .. } => Some(error),
            _ => None,
        }
    }
}
