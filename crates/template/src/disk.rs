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
}

impl DiskServer {
    /// Starts serving; the second value is the VMM's end of the connection.
    ///
    /// # Errors
    /// When no socket pair can be made.
    pub fn start(device: Arc<dyn BlockDevice>) -> Result<(Self, OwnedFd), VmmError> {
        let (ours, theirs) = nidus_vmm::process::socket_pair()?;
        let stream = UnixStream::from_std(ours).map_err(|e| VmmError::io("use the disk's socket", e))?;
        let stop = CancellationToken::new();
        let (export, token) = (Export::new(EXPORT, device), stop.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = serve(stream, &export, &token).await {
                tracing::debug!(%error, "the VMM left its disk");
            }
        });
        Ok((Self { task, stop }, theirs))
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
