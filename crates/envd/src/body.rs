//! Response bodies.

use std::convert::Infallible;

use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;

/// Why a body could not go on.
pub type BodyError = std::io::Error;

/// Any response's body.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(never).boxed_unsync()
}

/// A body that is there at once.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(never).boxed_unsync()
}

/// A body that comes in pieces.
pub fn stream(pieces: impl Stream<Item = Result<Bytes, BodyError>> + Send + 'static) -> Body {
    use futures::StreamExt;
    StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync()
}

fn never(e: Infallible) -> BodyError {
    match e {}
}
