//! A VM's disk: our NBD server at one end of a socket pair, the VMM at the other.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nidus_block::BlockDevice;
use nidus_block::nbd::{Export, serve};
use nidus_vmm::VmmError;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Name of the export, which the VMM asks for.
const EXPORT: &str = "root";
/// Longest wait for a VMM that does not take its answers.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Serves one device to one VMM until it hangs up or the server is shut down.
#[derive(Debug)]
pub struct DiskServer {
    task: JoinHandle<()>,
    stop: CancellationToken,
    lost: CancellationToken,
}

impl DiskServer {
    /// Starts serving; the second value is the VMM's end of the connection.
    ///
    /// # Errors
    /// When no socket pair can be made.
    pub fn start(device: Arc<dyn BlockDevice>) -> Result<(Self, OwnedFd), VmmError> {
        let (ours, theirs) = nidus_vmm::process::socket_pair()?;
        let stream = UnixStream::from_std(ours).map_err(|e| VmmError::io("use the disk's socket", e))?;
        let (stop, lost) = (CancellationToken::new(), CancellationToken::new());
        let export = Export::new(EXPORT, device);
        let (stopping, losing) = (stop.clone(), lost.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = serve(stream, &export, &stopping).await {
                tracing::debug!(%error, "the VMM left its disk");
            }
            if !stopping.is_cancelled() {
                losing.cancel();
            }
        });
        Ok((Self { task, stop, lost }, theirs))
    }

    /// Cancelled when the connection has ended although nobody shut it down.
    pub fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Lets requests in flight finish and closes the connection.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(DRAIN_TIME, &mut self.task).await.is_err() {
            self.task.abort();
            let _ = (&mut self.task).await;
        }
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
