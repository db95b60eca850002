//! Connections to guests: opened, kept, and closed with their sandbox.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::reply::Body;
use crate::{ENVD_PORT, ProxyConfig, Route};

/// Idle connections kept for one port of one sandbox.
const MAX_IDLE: usize = 32;
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
    gone: CancellationToken,
    idle: Mutex<HashMap<u16, Vec<Idle>>>,
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
            gone: route.gone.clone(),
            idle: Default::default(),
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

    /// A kept connection that still stands.
    pub fn kept(&self, port: u16) -> Option<SendRequest<Body>> {
        let mut idle = self.idle.lock();
        let list = idle.get_mut(&port)?;
        while let Some(i) = list.pop() {
            if i.since.elapsed() < idle_time(port) && i.sender.is_ready() && !i.sender.is_closed() {
                return Some(i.sender);
            }
        }
        None
    }

    /// Keeps a connection for the next request once it is free again.
    pub fn keep(self: &Arc<Self>, port: u16, mut sender: SendRequest<Body>) {
        let this = self.clone();
        tokio::spawn(async move {
            let free = tokio::select! {
                () = this.gone.cancelled() => false,
                r = sender.ready() => r.is_ok(),
            };
            if free {
                let mut idle = this.idle.lock();
                let list = idle.entry(port).or_default();
                list.retain(|i| i.since.elapsed() < idle_time(port) && !i.sender.is_closed());
                if list.len() < MAX_IDLE {
                    list.push(Idle { sender, since: Instant::now() });
                }
            }
        });
    }

    /// A new connection. Its task ends with the connection or with the sandbox.
    pub async fn connect(&self, port: u16, config: &ProxyConfig) -> Result<SendRequest<Body>, ConnectError> {
        let address = SocketAddr::from((self.host_ip, port));
        let stream = self.open_stream(address, config).await?;
        let _ = stream.set_nodelay(true);
        let (sender, connection) = Builder::new()
            .preserve_header_case(true)
            .title_case_headers(false)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| ConnectError::Unreachable(io::Error::other(e)))?;
        let gone = self.gone.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = gone.cancelled() => {}
                r = connection.with_upgrades() => {
                    if let Err(e) = r {
                        tracing::debug!(%address, "a connection to a guest ended: {e}");
                    }
                }
            }
        });
        Ok(sender)
    }

    async fn open_stream(
        &self,
        address: SocketAddr,
        config: &ProxyConfig,
    ) -> Result<TcpStream, ConnectError> {
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
