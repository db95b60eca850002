//! An attached device, and the way out.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::error::DetachError;
use super::pool::{Inner, Place};
use super::servers::Servers;
use super::{holders, sysfs};

/// Between two looks at something that has no event.
const LOOK: Duration = Duration::from_millis(5);

/// A device of the pool with its servers. Dropping it detaches it in the background.
pub struct AttachedDevice {
    node: PathBuf,
    size: u64,
    lost: CancellationToken,
    /// Taken by whoever detaches.
    parts: Option<Parts>,
}

/// What detaching consumes.
pub(super) struct Parts {
    pub(super) pool: Arc<Inner>,
    pub(super) place: Place,
    pub(super) servers: Servers,
}

impl std::fmt::Debug for AttachedDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttachedDevice").field("node", &self.node).field("size", &self.size).finish()
    }
}

impl AttachedDevice {
    pub(super) fn new(parts: Parts, size: u64) -> Self {
        let node = sysfs::node(parts.place.index());
        Self { node, size, lost: parts.servers.lost(), parts: Some(parts) }
    }

    /// The device's node, `/dev/nbdN`.
    pub fn path(&self) -> &Path {
        &self.node
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Cancelled when the device has lost every connection although it is attached: what its users
    /// ask of it fails.
    pub fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Waits until nobody has the device open (for the pool's limit at most), flushes it, and takes
    /// its connections away. Goes on in the background if the future is dropped.
    ///
    /// # Errors
    /// When the flush failed, or when the device is not known to be free afterwards: then it is in
    /// quarantine.
    pub async fn detach(mut self) -> Result<(), DetachError> {
        let shutdown = DetachError::Shutdown { node: self.node.clone() };
        let Some(parts) = self.parts.take() else { return Err(shutdown) };
        let (tasks, runtime) = (parts.pool.tasks.clone(), parts.pool.runtime.clone());
        tasks.spawn_on(release(parts), &runtime).await.unwrap_or(Err(shutdown))
    }
}

impl Drop for AttachedDevice {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            let (tasks, runtime) = (parts.pool.tasks.clone(), parts.pool.runtime.clone());
            let releasing = async {
                if let Err(error) = release(parts).await {
                    warn!(%error, "a dropped device was not detached cleanly");
                }
            };
            drop(tasks.spawn_on(releasing, &runtime));
        }
    }
}

/// Detaches, and gives the place back or puts it in quarantine.
pub(super) async fn release(parts: Parts) -> Result<(), DetachError> {
    let Parts { pool, place, servers } = parts;
    let index = place.index();
    let node = sysfs::node(index);
    let held = until(pool.config.hold_limit, move || holders::holder(index)).await;
    // A device that is lost has nothing to flush to, and would only wait for its timeout.
    let flushed = match servers.lost().is_cancelled() {
        true => Ok(()),
        false => flush(&node).await,
    };
    // From here on connections end because they are meant to.
    servers.detaching();
    let freed = pool.free(index).await;
    servers.end().await;
    if let Err(reason) = freed {
        let reason = held.map_or(reason.clone(), |who| format!("{who} still has it open ({reason})"));
        place.quarantine(&reason);
        return Err(DetachError::Quarantined { node, reason });
    }
    place.give_back();
    flushed.map_err(|source| DetachError::Flush { node, source })
}

/// Makes the kernel write what it has cached for the device, and the server flush.
async fn flush(node: &Path) -> io::Result<()> {
    let node = node.to_owned();
    let flushing = spawn_blocking(move || {
        let file = File::options().read(true).write(true).open(&node)?;
        file.sync_all()
    });
    flushing.await.map_err(io::Error::other)?
}

/// Looks again and again until `reason` finds none, for at most `limit`; returns the last.
pub(super) async fn until<T: Send + 'static>(
    limit: Duration,
    reason: impl Fn() -> Option<T> + Clone + Send + 'static,
) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        let found = spawn_blocking(reason.clone()).await.ok()??;
        if Instant::now() >= end {
            return Some(found);
        }
        sleep(LOOK).await;
    }
}

/// Whether the kernel has the node: without devtmpfs it would have to be made.
pub(super) fn has_node(index: u32) -> bool {
    fs::metadata(sysfs::node(index)).is_ok()
}
