//! The server ends of a device's connections.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info_span, warn};

use super::netlink::Driver;
use crate::nbd::{Export, serve_transmission};

/// How often broken connections of one device are replaced: what breaks again and again does so for a
/// reason that a new connection does not cure.
const REPLACEMENTS: u32 = 3;
/// How long the kernel may take to notice that a connection is dead.
const NOTICE_LIMIT: Duration = Duration::from_secs(2);
/// How long connections may take to end after the kernel has shut them down.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at something that has no event.
const LOOK: Duration = Duration::from_millis(5);

/// The tasks that serve one device. Dropping this ends them at once.
pub(super) struct Servers {
    supervisor: JoinHandle<()>,
    /// The device is being detached: connections that end now are meant to.
    detaching: CancellationToken,
    lost: CancellationToken,
}

impl Servers {
    /// Starts a server for each of so many new connections, and returns the kernel's ends.
    pub(super) fn start(
        driver: Driver,
        index: u32,
        backend: String,
        export: Export,
        connections: usize,
    ) -> io::Result<(Self, Vec<OwnedFd>)> {
        let mut supervisor = Supervisor {
            driver,
            index,
            backend,
            export,
            connections: JoinSet::new(),
            detaching: CancellationToken::new(),
            lost: CancellationToken::new(),
        };
        let sockets = (0..connections).map(|_| supervisor.add()).collect::<io::Result<Vec<_>>>()?;
        let (detaching, lost) = (supervisor.detaching.clone(), supervisor.lost.clone());
        let span = info_span!("nbd", device = index);
        Ok((Self { supervisor: tokio::spawn(supervisor.run().instrument(span)), detaching, lost }, sockets))
    }

    /// Cancelled when the device has no connection left although it is attached.
    pub(super) fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Connections that end from now on are not replaced.
    pub(super) fn detaching(&self) {
        self.detaching.cancel();
    }

    /// Waits until the servers have ended, after the kernel has shut their connections down.
    pub(super) async fn end(mut self) {
        self.detaching();
        // It has a limit of its own.
        let _ = (&mut self.supervisor).await;
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

struct Supervisor {
    driver: Driver,
    index: u32,
    backend: String,
    export: Export,
    connections: JoinSet<()>,
    detaching: CancellationToken,
    lost: CancellationToken,
}

impl Supervisor {
    /// Serves a new connection and returns the other end.
    fn add(&mut self) -> io::Result<OwnedFd> {
        let (ours, kernels) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(ours)?.into_split();
        let export = self.export.clone();
        let serving = async move {
            match serve_transmission(reader, writer, &export, &CancellationToken::new()).await {
                Ok(()) => debug!("the kernel closed a connection"),
                Err(error) => debug!(%error, "a connection ended early"),
            }
        };
        self.connections.spawn(serving.in_current_span());
        Ok(kernels.into())
    }

    async fn run(mut self) {
        let mut replaced = 0;
        loop {
            let ended = tokio::select! {
                biased;
                () = self.detaching.cancelled() => break,
                ended = self.connections.join_next() => ended,
            };
            let reason = match ended {
                Some(Err(error)) => error.to_string(),
                _ => "it was closed".to_owned(),
            };
            replaced += 1;
            let end = match replaced <= REPLACEMENTS {
                true => self.replace().await,
                false => Err(io::Error::other("it was replaced too often")),
            };
            match end {
                Ok(()) => warn!(reason, "a connection of an attached device ended and was replaced"),
                Err(error) => warn!(reason, %error, "a connection of an attached device ended for good"),
            }
            if self.connections.is_empty() {
                self.give_up().await;
                return;
            }
        }
        let connections = &mut self.connections;
        let drained = timeout(DRAIN_LIMIT, async { while connections.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            warn!("ending connections that the kernel does not close");
        }
        self.connections.shutdown().await;
    }

    /// The device has no connection left. Requests that it was sent would wait for their whole timeout.
    async fn give_up(&self) {
        self.lost.cancel();
        let (driver, index, backend) = (self.driver, self.index, self.backend.clone());
        match spawn_blocking(move || driver.disconnect(index, &backend)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "cannot disconnect a device that has no connection left"),
            // The runtime is being shut down.
            Err(_) => {}
        }
    }

    /// Makes a new connection in the place of a dead one.
    async fn replace(&mut self) -> io::Result<()> {
        let socket = std::sync::Arc::new(self.add()?);
        let end = Instant::now() + NOTICE_LIMIT;
        loop {
            let (driver, index, backend) = (self.driver, self.index, self.backend.clone());
            let kernels = socket.clone();
            let answer = spawn_blocking(move || driver.reconnect(index, &backend, &kernels)).await;
            match answer.map_err(io::Error::other)? {
                Err(e) if e.kind() == io::ErrorKind::StorageFull && Instant::now() < end => sleep(LOOK).await,
                other => return other,
            }
        }
    }
}
