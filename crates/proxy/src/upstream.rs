//! Connections to guests: opened, kept, and closed with their sandbox.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hyper::client::conn::http1::{self, SendRequest};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use crate::reply::Body;
use crate::server::worker;
use crate::{ENVD_PORT, ProxyConfig, Route};

/// A connection to a guest.
type Stream = Either<TcpStream, TlsStream<TcpStream>>;

/// Idle connections kept by one worker for one port of one sandbox.
const MAX_IDLE: usize = 128;
/// How many of them are looked at before a new one is opened.
const LOOKS: usize = 16;
/// And for how long: servers close idle connections too, common ones after 5 s, and a request that
/// meets the close is lost.
const IDLE_TIME: Duration = Duration::from_secs(4);
/// envd waits for minutes.
const ENVD_IDLE_TIME: Duration = Duration::from_secs(60);

fn idle_time(port: u16) -> Duration {
    if port == ENVD_PORT { ENVD_IDLE_TIME } else { IDLE_TIME }
}

struct Idle {
    sender: SendRequest<Body>,
    since: Instant,
}

/// All connections to one run of one sandbox.
pub struct Upstream {
    host_ip: std::net::Ipv4Addr,
    https_ports: Vec<u16>,
    gone: CancellationToken,
    /// By worker and port: a connection is driven by the thread that opened it.
    idle: Mutex<HashMap<(usize, u16), VecDeque<Idle>>>,
    /// Of HTTP/2, which many requests share.
    shared: Mutex<HashMap<(usize, u16), http2::SendRequest<Body>>>,
    opening: tokio::sync::Mutex<()>,
    open: AtomicUsize,
}

/// Counts one open request; the count ends with it.
pub struct Permit(Arc<Upstream>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// Nobody listens at that port.
    Closed,
    /// No answer in time, or the sandbox ended.
    Unreachable(io::Error),
}

impl Upstream {
    /// Connections to this run, none open yet.
    pub fn new(route: &Route) -> Arc<Self> {
        Arc::new(Self {
            host_ip: route.host_ip,
            https_ports: route.https_ports.clone(),
            gone: route.gone.clone(),
            idle: Default::default(),
            shared: Default::default(),
            opening: Default::default(),
            open: AtomicUsize::new(0),
        })
    }

    /// Whether this is the run that `route` leads to. A token is cancelled once, so two runs
    /// never share one; an address they may.
    pub fn is_for(&self, route: &Route) -> bool {
        self.host_ip == route.host_ip && !self.gone.is_cancelled()
    }

    /// Cancelled when the sandbox ends.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// One more request, unless there are too many.
    pub fn admit(self: &Arc<Self>, limit: usize) -> Option<Permit> {
        if self.open.fetch_add(1, Relaxed) >= limit {
            self.open.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Permit(self.clone()))
    }

    /// A kept connection of this worker that still stands.
    pub fn kept(&self, port: u16) -> Option<SendRequest<Body>> {
        let now = Instant::now();
        let mut idle = self.idle.lock();
        let list = idle.get_mut(&(worker(), port))?;
        while list.front().is_some_and(|i| now - i.since >= idle_time(port)) {
            list.pop_front();
        }
        // The last one first, so that few are kept. One that is not ready has not read the last answer's end
        // yet, or writes a request still.
        let mut at = list.len();
        for _ in 0..list.len().min(LOOKS) {
            at -= 1;
            if list[at].sender.is_closed() {
                list.remove(at);
            } else if list[at].sender.is_ready() {
                return list.remove(at).map(|i| i.sender);
            }
        }
        None
    }

    /// Keeps a connection, of which an answer was read to its end, for the next request.
    pub fn keep(&self, port: u16, sender: SendRequest<Body>) {
        if sender.is_closed() || self.gone.is_cancelled() {
            return;
        }
        let mut idle = self.idle.lock();
        let list = idle.entry((worker(), port)).or_default();
        if list.len() >= MAX_IDLE {
            list.pop_front();
        }
        list.push_back(Idle { sender, since: Instant::now() });
    }

    /// A new connection. Its task ends with the connection or with the sandbox.
    pub async fn connect(&self, port: u16, config: &ProxyConfig) -> Result<SendRequest<Body>, ConnectError> {
        let stream = self.open_stream(port, config, &[b"http/1.1"]).await?;
        let (sender, connection) = http1::Builder::new()
            .title_case_headers(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| ConnectError::Unreachable(io::Error::other(e)))?;
        self.drive(port, connection.with_upgrades());
        Ok(sender)
    }

    /// The connection of HTTP/2 to a port, which is opened when there is none.
    pub async fn http2(
        &self,
        port: u16,
        config: &ProxyConfig,
    ) -> Result<http2::SendRequest<Body>, ConnectError> {
        let key = (worker(), port);
        let standing = || self.shared.lock().get(&key).filter(|s| !s.is_closed()).cloned();
        if let Some(sender) = standing() {
            return Ok(sender);
        }
        // Those who come together open one together.
        let _turn = self.opening.lock().await;
        if let Some(sender) = standing() {
            return Ok(sender);
        }
        let stream = self.open_stream(port, config, &[b"h2"]).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .adaptive_window(true)
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| ConnectError::Unreachable(io::Error::other(e)))?;
        self.drive(port, connection);
        let mut shared = self.shared.lock();
        shared.retain(|_, s| !s.is_closed());
        shared.insert(key, sender.clone());
        Ok(sender)
    }

    fn drive(&self, port: u16, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        let gone = self.gone.clone();
        tokio::spawn(async move {
            if let Some(Err(e)) = gone.run_until_cancelled(connection).await {
                tracing::debug!(port, "a connection to a guest ended: {e}");
            }
        });
    }

    async fn open_stream(
        &self,
        port: u16,
        config: &ProxyConfig,
        alpn: &[&[u8]],
    ) -> Result<Stream, ConnectError> {
        let address = SocketAddr::from((self.host_ip, port));
        let stream = self.open_tcp(address, config).await?;
        let _ = stream.set_nodelay(true);
        if !self.https_ports.contains(&port) {
            return Ok(Either::Left(stream));
        }
        let unreachable = ConnectError::Unreachable;
        let mut tls = ClientConfig::clone(&*crate::tls::to_guests().map_err(unreachable)?);
        tls.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        let connecting = TlsConnector::from(Arc::new(tls)).connect(IpAddr::from(self.host_ip).into(), stream);
        match tokio::time::timeout(config.connect_timeout, connecting).await {
            Ok(Ok(stream)) => Ok(Either::Right(stream)),
            Ok(Err(e)) => Err(unreachable(e)),
            Err(_) => Err(unreachable(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn open_tcp(&self, address: SocketAddr, config: &ProxyConfig) -> Result<TcpStream, ConnectError> {
        let end = Instant::now() + config.connect_retry;
        loop {
            let tried = tokio::select! {
                () = self.gone.cancelled() => {
                    return Err(ConnectError::Unreachable(io::Error::other("the sandbox ended")));
                }
                t = tokio::time::timeout(config.connect_timeout, TcpStream::connect(address)) => t,
            };
            match tried {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    if Instant::now() >= end {
                        return Err(ConnectError::Closed);
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(Err(e)) => return Err(ConnectError::Unreachable(e)),
                Err(_) => return Err(ConnectError::Unreachable(io::ErrorKind::TimedOut.into())),
            }
        }
    }
}

/// Connections of all sandboxes that were asked for, by id.
#[derive(Default)]
pub struct Upstreams {
    all: Mutex<HashMap<String, Arc<Upstream>>>,
}

impl Upstreams {
    /// Those of the run that `route` leads to.
    pub fn of(&self, sandbox_id: &str, route: &Route) -> Arc<Upstream> {
        let mut all = self.all.lock();
        if let Some(u) = all.get(sandbox_id).filter(|u| u.is_for(route)) {
            return u.clone();
        }
        // Entries of ended sandboxes go when others come.
        all.retain(|_, u| !u.gone().is_cancelled());
        let upstream = Upstream::new(route);
        all.insert(sandbox_id.to_owned(), upstream.clone());
        upstream
    }
}
