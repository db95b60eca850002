//! An S3 server on loopback: `s3s-fs`, which keeps objects as files, behind real HTTP, with a delay
//! and failures on demand and a count of the bytes that it sends.

#![allow(dead_code, reason = "each user uses its part")]

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::{Response, StatusCode, body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{
    Body, HttpError,
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

/// How the server behaves.
pub struct Config {
    /// Where buckets lie, each a directory.
    pub root: PathBuf,
    pub access_key: String,
    pub secret_key: String,
    /// Added to every request.
    pub latency: Duration,
    /// Every request whose number is a multiple of this is answered with 503; 0: none.
    pub fail_every: u64,
}

/// What the server did so far.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    /// Bytes sent to clients, headers included.
    pub sent: AtomicU64,
}

/// A running server; it ends when this is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub counters: Arc<Counters>,
    _accepting: AbortOnDropHandle<()>,
}

impl Server {
    pub async fn start(address: SocketAddr, config: Config) -> io::Result<Self> {
        let files = FileSystem::new(&config.root).map_err(|e| io::Error::other(format!("{e:?}")))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(config.access_key, config.secret_key));
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let counters = Arc::new(Counters::default());
        let slow = Slow {
            s3: service.build(),
            latency: config.latency,
            fail_every: config.fail_every,
            counters: counters.clone(),
        };
        let accepting = tokio::spawn(accept(listener, slow));
        Ok(Self { address, counters, _accepting: AbortOnDropHandle::new(accepting) })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

async fn accept(listener: TcpListener, service: Slow) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Small answers must not wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        let stream = Counted { stream, counters: service.counters.clone() };
        let service = service.clone();
        connections.spawn(async move {
            let builder = Builder::new(TokioExecutor::new());
            // A client that goes away is no concern of the server's.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

#[derive(Clone)]
struct Slow {
    s3: S3Service,
    latency: Duration,
    fail_every: u64,
    counters: Arc<Counters>,
}

impl Service<hyper::Request<Incoming>> for Slow {
    type Response = Response<Body>;
    type Error = HttpError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, HttpError>> + Send>>;

    fn call(&self, request: hyper::Request<Incoming>) -> Self::Future {
        let (s3, latency) = (self.s3.clone(), self.latency);
        let number = self.counters.requests.fetch_add(1, Relaxed) + 1;
        let fails = self.fail_every != 0 && number.is_multiple_of(self.fail_every);
        Box::pin(async move {
            tokio::time::sleep(latency).await;
            if fails {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                return Ok(response);
            }
            Service::call(&s3, request).await
        })
    }
}

/// A connection that counts what is sent.
struct Counted {
    stream: TcpStream,
    counters: Arc<Counters>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = &sent {
            self.counters.sent.fetch_add(*n as u64, Relaxed);
        }
        sent
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
