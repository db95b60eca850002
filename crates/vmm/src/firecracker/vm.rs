//! One running Firecracker.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::{MetadataExt, fchown};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::api::{
    BackendType, Client, CreateSnapshot, LoadSnapshot, MemoryBackend, NetworkOverride, SnapshotType,
    Vm as VmCall, VmState,
};
use super::place;
use super::start::{INTERFACE, STEP_LIMIT, unsupported};
use crate::console::Tail;
use crate::jail::Jail;
use crate::mount::Access;
use crate::process::ExitWatch;
use crate::running::{Running, StepError};
use crate::{Memory, MemorySaved, Result, SaveMemory, SnapshotFiles, Vm, VmmError, data_ranges};

/// Most bytes of a state, which holds the registers of some processors and devices.
const STATE_LIMIT: u64 = 32 << 20;
/// Memory is written to disk at least this fast, in MiB a second, or something is broken.
const SAVE_RATE: u32 = 16;

/// What a load is asked for beside the state.
#[derive(Debug)]
pub(super) struct LoadOptions {
    pub tap: String,
    pub track_dirty: bool,
    pub advance_clock: bool,
}

/// One Firecracker process.
#[derive(Debug)]
pub(super) struct FirecrackerVm {
    // First: dropped, and so killed, before its jail.
    pub running: Running,
    pub api: Client,
    jail: Arc<Jail>,
    /// The process's mount namespace.
    mounts: Arc<File>,
    console: Option<Tail>,
    /// Where the memory of a load comes from; gone once it was loaded.
    memory: Option<Memory>,
    memory_mb: u32,
    uid: u32,
    options: LoadOptions,
}

impl FirecrackerVm {
    #[allow(clippy::too_many_arguments)] // The parts of one thing, put together in one place.
    pub fn new(
        running: Running,
        jail: Jail,
        mounts: File,
        api: Client,
        console: Option<Tail>,
        memory: Memory,
        memory_mb: u32,
        uid: u32,
        options: LoadOptions,
    ) -> Self {
        let (jail, mounts, memory) = (Arc::new(jail), Arc::new(mounts), Some(memory));
        Self { running, api, jail, mounts, console, memory, memory_mb, uid, options }
    }

    /// Puts the state where the process reads it.
    async fn bring_state(&self, from: File) -> Result<()> {
        let to = self.jail.own_file(place::STATE)?;
        blocking("copy a state into a VMM's jail", move || copy_state(from, to).map(drop)).await
    }

    /// Lets the process load, and hands its memory connection to the server while it does.
    async fn load_served(
        &self,
        load: &LoadSnapshot,
        server: oneshot::Sender<std::os::unix::net::UnixStream>,
    ) -> Result<()> {
        let listener = self.jail.listen(place::UFFD)?;
        let lost = |what: &str, e: io::Error| StepError::Refused(format!("{what}: {e}"));
        let work = async {
            let request = self.api.send(load);
            tokio::pin!(request);
            let stream = tokio::select! {
                accepted = listener.accept() => accepted.map_err(|e| lost("accept the memory connection", e))?.0,
                r = &mut request => {
                    r?;
                    return Err(StepError::Refused("the state was loaded without its memory".into()));
                }
            };
            let peer = stream.peer_cred().map_err(|e| lost("ask who wants memory", e))?;
            if peer.pid() != i32::try_from(self.running.process.pid()).ok() {
                return Err(StepError::Refused("another process asked for the memory".into()));
            }
            let stream = stream.into_std().map_err(|e| lost("hand over the memory connection", e))?;
            server.send(stream).map_err(|_| StepError::Refused("the memory's server is gone".into()))?;
            Ok(request.await?)
        };
        let result = self.running.step("loading the state", STEP_LIMIT, work).await;
        drop(listener);
        let removed = self.jail.remove(place::UFFD);
        result.and(removed)
    }

    /// Has the process write a snapshot; its state is in the returned file then.
    async fn save(&self, kind: SnapshotType) -> Result<File> {
        let state = self.jail.own_file(place::STATE)?;
        let limit = STEP_LIMIT + Duration::from_secs(u64::from(self.memory_mb / SAVE_RATE));
        let call = CreateSnapshot {
            snapshot_path: place::path(place::STATE),
            mem_file_path: place::path(place::MEMORY),
            snapshot_type: Some(kind),
        };
        let result = self.running.step("saving the state", limit, self.api.send(&call)).await;
        let removed = self.jail.remove(place::STATE);
        result.and(removed).map(|()| state)
    }
}

/// Copies a state from its beginning; returns the copy.
fn copy_state(mut from: File, mut to: File) -> io::Result<File> {
    from.rewind()?;
    let n = io::copy(&mut (&mut from).take(STATE_LIMIT + 1), &mut to)?;
    if n == 0 || n > STATE_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {n} bytes")));
    }
    Ok(to)
}

async fn blocking<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| VmmError::io(action, e))
}

/// A file of the caller's that the process may write for a while.
struct Lent {
    file: File,
    jail: Arc<Jail>,
    mounts: Arc<File>,
    /// User and group that it belonged to.
    owner: (u32, u32),
}

impl Lent {
    /// Blocks.
    fn new(file: File, jail: Arc<Jail>, mounts: Arc<File>, uid: u32) -> Result<Self> {
        let wrap = |e| VmmError::io("lend a memory file to a VMM", e);
        let meta = file.metadata().map_err(wrap)?;
        fchown(&file, Some(uid), Some(uid)).map_err(wrap)?;
        let owner = (meta.uid(), meta.gid());
        if let Err(e) = jail.attach(&mounts, place::MEMORY, &file, Access::Write) {
            let _ = fchown(&file, Some(owner.0), Some(owner.1));
            return Err(e);
        }
        Ok(Self { file, jail, mounts, owner })
    }
}

/// Also when the snapshot is cancelled.
impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(e) = self.jail.detach(&self.mounts, place::MEMORY) {
            tracing::warn!("{e}");
        }
        if let Err(e) = fchown(&self.file, Some(self.owner.0), Some(self.owner.1)) {
            tracing::warn!("cannot take back a memory file: {e}");
        }
    }
}

#[async_trait]
impl Vm for FirecrackerVm {
    async fn load(&mut self, snapfile: File) -> Result<()> {
        let memory = self.memory.take();
        let (backend_type, backend) = match &memory {
            Some(Memory::Served(_)) => (BackendType::Uffd, place::UFFD),
            Some(Memory::Private(_)) => (BackendType::File, place::MEMORY),
            _ => return Err(unsupported(&self.running.name, "load a state into a VM that has one")),
        };
        self.bring_state(snapfile).await?;
        let load = LoadSnapshot {
            snapshot_path: place::path(place::STATE),
            mem_backend: MemoryBackend { backend_type, backend_path: place::path(backend) },
            track_dirty_pages: Some(self.options.track_dirty),
            resume_vm: Some(false),
            network_overrides: vec![NetworkOverride {
                iface_id: INTERFACE.into(),
                host_dev_name: self.options.tap.clone(),
            }],
            vsock_override: None,
            clock_realtime: self.options.advance_clock.then_some(true),
        };
        let result = match memory {
            Some(Memory::Served(server)) => self.load_served(&load, server).await,
            _ => self.call("loading the state", &load).await,
        };
        let removed = self.jail.remove(place::STATE);
        result.and(removed)
    }

    async fn resume(&mut self) -> Result<()> {
        self.call("resuming", &VmCall { state: VmState::Resumed }).await
    }

    async fn pause(&mut self) -> Result<()> {
        self.call("pausing", &VmCall { state: VmState::Paused }).await
    }

    async fn snapshot(&mut self, files: SnapshotFiles) -> Result<MemorySaved> {
        let (kind, file) = match files.memory {
            SaveMemory::Full(file) => (SnapshotType::Full, file),
            SaveMemory::Diff(file) => (SnapshotType::Diff, file),
            SaveMemory::Stay => {
                return Err(unsupported(&self.running.name, "save a state without its memory"));
            }
        };
        let (jail, mounts, uid) = (self.jail.clone(), self.mounts.clone(), self.uid);
        let lent = tokio::task::spawn_blocking(move || {
            // A diff would be merged into what is there.
            file.set_len(0).map_err(|e| VmmError::io("empty a memory file", e))?;
            Lent::new(file, jail, mounts, uid)
        });
        let lent =
            lent.await.map_err(|e| VmmError::io("lend a memory file to a VMM", io::Error::other(e)))??;
        let state = self.save(kind).await?;
        let size = u64::from(self.memory_mb) << 20;
        let to = files.state;
        blocking("take a snapshot over from a VMM", move || {
            copy_state(state, to)?.sync_all()?;
            let have = lent.file.metadata()?.len();
            if have != size {
                let text = format!("{have} bytes of memory were saved instead of {size}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            match kind {
                SnapshotType::Full => Ok(MemorySaved::Full),
                SnapshotType::Diff => data_ranges(&lent.file).map(MemorySaved::Diff),
            }
        })
        .await
    }

    fn pid(&self) -> u32 {
        self.running.process.pid()
    }

    fn exit(&self) -> ExitWatch {
        self.running.process.exit()
    }

    fn console(&self) -> String {
        self.console.as_ref().map(Tail::text).unwrap_or_default()
    }

    async fn kill(self: Box<Self>) -> Result<()> {
        let Self { running, jail, mounts, .. } = *self;
        let result = running.kill().await;
        // The last holders of its mounts.
        drop((mounts, jail));
        result
    }
}
