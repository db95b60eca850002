//! An answer on its way to the client, and how long it may take.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::ProxyConfig;
use crate::reply::Body;
use crate::upstream::{Permit, Upstream};

/// The times of one request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub idle: Option<Duration>,
    pub end: Option<Instant>,
}

impl Limits {
    pub fn of(config: &ProxyConfig) -> Self {
        Self { idle: config.idle_timeout, end: config.total_timeout.map(|t| Instant::now() + t) }
    }

    /// When it is over if nothing moves from now on.
    pub fn next(&self) -> Option<Instant> {
        let idle = self.idle.map(|t| Instant::now() + t);
        match (idle, self.end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Resolves then.
    pub async fn over(&self) {
        match self.next() {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

/// The connection that a request has, and its place among those of its sandbox.
pub struct Used {
    pub upstream: Arc<Upstream>,
    pub port: u16,
    /// Kept for others when the answer was read to its end.
    pub sender: Option<SendRequest<Body>>,
    pub _permit: Permit,
}

/// A guest's body, cut when the sandbox ends or nothing moves any more.
pub struct Streamed {
    body: Incoming,
    connection: Used,
    limits: Limits,
    over: Option<Pin<Box<Sleep>>>,
}

impl Streamed {
    pub fn new(body: Incoming, connection: Used, limits: Limits) -> Self {
        let mut this = Self { body, connection, limits, over: None };
        if this.body.is_end_stream() {
            this.ended();
        }
        this
    }

    fn ended(&mut self) {
        if let Some(sender) = self.connection.sender.take() {
            self.connection.upstream.keep(self.connection.port, sender);
        }
    }
}

impl HttpBody for Streamed {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            // The end of the connection looks like the end of an answer that has no length.
            Poll::Ready(None) if this.connection.upstream.gone().is_cancelled() => {
                Poll::Ready(Some(Err("the sandbox ended".into())))
            }
            Poll::Ready(frame) => {
                this.over = None;
                if frame.is_none() || this.body.is_end_stream() {
                    this.ended();
                }
                Poll::Ready(frame.map(|f| f.map_err(Into::into)))
            }
            Poll::Pending => {
                if this.over.is_none()
                    && let Some(at) = this.limits.next()
                {
                    this.over = Some(Box::pin(sleep_until(at)));
                }
                match this.over.as_mut().map(|over| over.as_mut().poll(cx)) {
                    Some(Poll::Ready(())) => Poll::Ready(Some(Err("the answer took too long".into()))),
                    _ => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
