//! Whether a request's body was read to its end.
//!
//! A guest may answer before it has read all of a request. The rest of the body then stands in the way of the
//! client's next request, so an HTTP/1 connection ends with such an answer (RFC 9112, 9.3), and the answer has to
//! say so: a client that does not know writes its next request into a closed connection.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// A request's body.
#[derive(Debug)]
pub struct Watched {
    body: Incoming,
    at_end: Arc<AtomicBool>,
}

/// What is to be done to the answer.
#[derive(Debug)]
pub struct Watch {
    http1: bool,
    at_end: Arc<AtomicBool>,
}

/// Watches a request's body.
pub fn watch(request: Request<Incoming>) -> (Request<Watched>, Watch) {
    let http1 = request.version() <= Version::HTTP_11;
    let at_end = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    let watch = Watch { http1, at_end: at_end.clone() };
    (request.map(|body| Watched { body, at_end }), watch)
}

impl Watch {
    /// Lets the answer say that the connection ends with it, if it does.
    pub fn close_if_unread<B>(self, response: &mut Response<B>) {
        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if self.http1 && !upgraded && !self.at_end.load(Relaxed) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.at_end.store(true, Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
