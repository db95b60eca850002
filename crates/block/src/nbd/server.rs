//! The server on its socket.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, debug, info_span, warn};

use super::{Export, serve};
use crate::BlockDevice;

/// The most clients at a time; a VMM needs one.
const MAX_CONNECTIONS: usize = 16;
/// How long [`NbdServer::shutdown`] waits for clients that do not take their answers.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Pause after a failed accept: it fails when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketAccess {
    /// Mode of the socket file.
    pub mode: u32,
    /// Owner and group of the socket file, if not the process's own.
    pub owner: Option<(u32, u32)>,
}

impl Default for SocketAccess {
    /// The process's own user only.
    fn default() -> Self {
        Self { mode: 0o600, owner: None }
    }
}

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket could not be made.
    #[error("cannot listen on the socket {}: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The socket's owner or mode could not be set.
    #[error("cannot set who may connect to the socket {}: {source}", path.display())]
    Access {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// An NBD server for one device on a unix socket, run by tasks of the current runtime.
///
/// Dropping it closes every connection at once and removes the socket; [`NbdServer::shutdown`] lets
/// requests in flight finish first. Neither flushes the device.
#[derive(Debug)]
pub struct NbdServer {
    path: PathBuf,
    tasks: TaskTracker,
    /// Asks connections to finish what is in flight.
    stop: CancellationToken,
    /// Ends connections at once.
    abort: CancellationToken,
}

impl NbdServer {
    /// Serves `device` as `export_name` (and as the default export) at `socket_path`, which must not
    /// exist, to the process's own user.
    ///
    /// Must be called within a tokio runtime.
    pub fn bind(
        socket_path: impl Into<PathBuf>,
        export_name: &str,
        device: Arc<dyn BlockDevice>,
    ) -> Result<Self, ServerError> {
        Self::bind_with(socket_path, export_name, device, SocketAccess::default())
    }

    /// Like [`NbdServer::bind`], for whom `access` says. The directory's mode decides who can
    /// connect in the instant before the socket's is set.
    pub fn bind_with(
        socket_path: impl Into<PathBuf>,
        export_name: &str,
        device: Arc<dyn BlockDevice>,
        access: SocketAccess,
    ) -> Result<Self, ServerError> {
        let path = socket_path.into();
        let listener =
            UnixListener::bind(&path).map_err(|source| ServerError::Bind { path: path.clone(), source })?;
        // From here on the socket is removed if anything fails.
        let server = Self {
            path,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
        };
        server.allow(access).map_err(|source| ServerError::Access { path: server.path.clone(), source })?;
        let acceptor = Acceptor {
            export: Export::new(export_name, device),
            tasks: server.tasks.clone(),
            stop: server.stop.clone(),
            abort: server.abort.clone(),
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        };
        let span = info_span!("nbd", socket = %server.path.display());
        server.tasks.spawn(acceptor.run(listener).instrument(span));
        Ok(server)
    }

    fn allow(&self, access: SocketAccess) -> io::Result<()> {
        if let Some((uid, gid)) = access.owner {
            chown(&self.path, Some(uid), Some(gid))?;
        }
        fs::set_permissions(&self.path, fs::Permissions::from_mode(access.mode))
    }

    /// The socket.
    pub fn socket_path(&self) -> &Path {
        &self.path
    }

    /// Stops accepting, lets every connection finish and answer what is in flight (for up to 5
    /// seconds), closes them and removes the socket.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(DRAIN_TIME, self.tasks.wait()).await.is_err() {
            warn!(socket = %self.path.display(), "closing NBD connections whose client does not take its answers");
            self.abort.cancel();
            self.tasks.wait().await;
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.cancel();
        self.abort.cancel();
        self.tasks.close();
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, socket = %self.path.display(), "cannot remove an NBD socket");
        }
    }
}

struct Acceptor {
    export: Export,
    tasks: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
    places: Arc<Semaphore>,
}

impl Acceptor {
    async fn run(self, listener: UnixListener) {
        let serving = async {
            // The semaphore is never closed.
            while let Ok(place) = self.places.clone().acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let connection =
                            connection(stream, self.export.clone(), self.stop.clone(), self.abort.clone());
                        let connection = async move {
                            connection.await;
                            drop(place);
                        };
                        self.tasks.spawn(connection.in_current_span());
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept an NBD connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = serving => {}
        }
    }
}

async fn connection(stream: UnixStream, export: Export, stop: CancellationToken, abort: CancellationToken) {
    tokio::select! {
        () = abort.cancelled() => {}
        result = serve(stream, &export, &stop) => match result {
            Ok(()) => {}
            Err(error) => debug!(%error, "an NBD connection ended early"),
        },
    }
}
