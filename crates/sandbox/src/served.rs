//! A VM's memory as this process serves it, page by page (userfaultfd).

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use nidus_memfs::MemFsError;
use nidus_memory::uffd::{
    Config, End, Handler, HandlerError, Handshake, HandshakeError, PageSource, Recording, StartError,
};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A VMM that was told to load hands its memory over at once.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);

/// Pages that are put in place together, the one that was needed among them. A fault costs as much as the
/// copies of several pages, and the neighbours of a page that is needed mostly are too.
pub const AROUND: usize = 4;

/// Why a VM's memory is not served.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The VMM never asked for it.
    #[error("the VMM did not hand its memory over")]
    NotAsked,
    /// The connection cannot be used.
    #[error("Cannot use the VMM's memory connection: {0}")]
    Connection(std::io::Error),
    /// What the VMM sent is not its memory.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It cannot be served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It could be served no longer.
    #[error(transparent)]
    Handler(#[from] Arc<HandlerError>),
    /// The memory file that VMMs map.
    #[error(transparent)]
    File(MemFsError),
    /// A VMM wants to map the memory, and this node serves it.
    #[error("the memory of VMs is not served as a file here")]
    NoFile,
}

/// The server of one VM's memory. The VM must have ended before this is stopped or its last clone is dropped: a
/// page that nobody answers for reads as zeros.
#[derive(Debug, Clone)]
pub struct ServedMemory {
    handler: Arc<Handler>,
    /// The connection, of a VMM that keeps it.
    connection: Option<CancellationToken>,
}

/// A VM's memory while the VMM loads its state: served as soon as the VMM has handed it over.
#[derive(Debug)]
pub struct Serving {
    task: JoinHandle<Result<ServedMemory, MemoryError>>,
    done: Option<Result<ServedMemory, MemoryError>>,
}

/// Serves what comes through `connection`.
pub fn serve(connection: oneshot::Receiver<StdUnixStream>, source: Arc<dyn PageSource>) -> Serving {
    let task = tokio::spawn(async move {
        let stream = connection.await.map_err(|_| MemoryError::NotAsked)?;
        stream.set_nonblocking(true).map_err(MemoryError::Connection)?;
        let stream = UnixStream::from_std(stream).map_err(MemoryError::Connection)?;
        let handshake = Handshake::receive(stream, source.size(), HANDSHAKE_LIMIT).await?;
        let handler = Handler::start(handshake, source, Config { around: AROUND, ..Config::default() })?;
        Ok(ServedMemory { handler: Arc::new(handler), connection: None })
    });
    Serving { task, done: None }
}

impl Serving {
    async fn served(&mut self) -> &Result<ServedMemory, MemoryError> {
        let task = &mut self.task;
        match &mut self.done {
            Some(done) => done,
            empty => {
                let done = task.await;
                empty.insert(done.unwrap_or_else(|e| Err(MemoryError::Connection(std::io::Error::other(e)))))
            }
        }
    }

    /// Resolves when the memory can be served no longer: a VMM that still loads waits for it in vain. Can be
    /// dropped at any time.
    pub async fn failed(&mut self) {
        if let Ok(memory) = self.served().await {
            memory.failed().await;
        } else {
            // The VMM learns of it.
            std::future::pending().await
        }
    }

    /// The server, once the VMM has loaded its state or is gone.
    pub async fn finish(mut self) -> Result<ServedMemory, MemoryError> {
        self.served().await;
        let memory = self.done.unwrap_or(Err(MemoryError::NotAsked))?;
        let connection = memory.handler.disconnected();
        Ok(ServedMemory { connection: (!connection.is_cancelled()).then_some(connection), ..memory })
    }
}

impl ServedMemory {
    /// Which pages the VM has needed so far, in their order.
    pub fn recording(&self) -> Recording {
        self.handler.recording()
    }

    /// Puts the pages of a recording in place ahead of need, in the background.
    pub fn prefetch(&self, recording: Option<&Recording>) {
        if let Some(recording) = recording
            && self.handler.prefetch(recording).is_err()
        {
            tracing::debug!("a recording of other memory was not used");
        }
    }

    /// Why it can be served no longer, if that is so.
    pub fn failure(&self) -> Option<String> {
        self.handler.failure().map(|e| e.to_string())
    }

    /// Resolves when the memory can be served no longer, with the reason; the VM must be killed
    /// then. A VM that ends by itself is not such a reason.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let (handler, connection) = (self.handler.clone(), self.connection.clone());
        async move {
            let lost = async {
                match &connection {
                    Some(connection) => connection.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            let failed = async {
                match handler.ended().await {
                    Err(e) => e,
                    Ok(End::Exited | End::Disconnected | End::Stopped) => std::future::pending().await,
                }
            };
            tokio::select! {
                e = failed => e.to_string(),
                () = lost => "the connection of its memory was lost".to_owned(),
            }
        }
    }

    /// Ends it, after the VM.
    pub async fn stop(self) {
        // Somebody who still waits for its failure drops it later; the VM is gone either way.
        let Ok(handler) = Arc::try_unwrap(self.handler) else { return };
        let metrics = handler.metrics();
        if let Err(e) = handler.stop().await {
            tracing::warn!("while the memory of a VM was released: {e}");
        }
        tracing::debug!(?metrics, "the memory of a VM is released");
    }
}
