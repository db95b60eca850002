//! A template opened for use: checked once, then shared by every sandbox made of it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nidus_block::header::Header;
use nidus_block::{MappedDevice, ReadDevice};
use nidus_memory::uffd::{PageSource, Recording};
use nidus_storage::{Artifact, BuildId, LocalStore, StorageError};
use nidus_template::TemplateMetadata;
use nidus_vmm::DriverId;

use crate::pages::BuildPages;
use crate::{CreateError, pages};

/// A build's metadata and open root disk; memfile and snapfile are opened anew for each VM, so
/// that no two share a file position.
pub struct OpenTemplate {
    /// `metadata.json`.
    pub metadata: TemplateMetadata,
    /// The read-only root disk.
    pub rootfs: Arc<dyn ReadDevice>,
    /// The disk by its header, which a pause compares with.
    pub(crate) disk: Arc<MappedDevice>,
    /// The memory by its header, likewise.
    pub(crate) memory: Arc<MappedDevice>,
    /// The memory file of the build that the line of pauses began with: it is whole.
    memfile: PathBuf,
    store: LocalStore,
    /// What the first sandbox needed of it until envd answered.
    recording: OnceLock<Recording>,
}

impl OpenTemplate {
    /// Opens and checks a build: complete, made by this VMM, sizes as the metadata says.
    pub async fn open(store: &LocalStore, build: BuildId, here: &DriverId) -> Result<Self, CreateError> {
        if !store.exists(build).await? {
            return Err(CreateError::TemplateNotFound(build));
        }
        let metadata = TemplateMetadata::parse(build, &store.read(build, Artifact::Metadata).await?)?;
        metadata.check_vmm(here)?;
        let memory = mapped(store, build, Artifact::Memfile, Artifact::MemfileHeader).await?;
        let disk = mapped(store, build, Artifact::Rootfs, Artifact::RootfsHeader).await?;
        let rootfs: Arc<dyn ReadDevice> = disk.clone();
        let base = memory.header().base();
        let memfile = store.path(base, Artifact::Memfile);
        let damaged = |what: String| CreateError::Damaged { build, what };
        let opened = store.clone();
        let size = blocking(move || Ok(opened.open_artifact(base, Artifact::Memfile)?.size())).await?;
        if size != u64::from(metadata.memory_mb) << 20 {
            return Err(damaged(format!("memfile has {size} bytes, expected {} MiB", metadata.memory_mb)));
        }
        if rootfs.size() != u64::from(metadata.disk_mb) << 20 {
            let size = rootfs.size();
            return Err(damaged(format!("rootfs.ext4 has {size} bytes, expected {} MiB", metadata.disk_mb)));
        }
        if memory.size() != size {
            let mapped = memory.size();
            return Err(damaged(format!("memfile.header maps {mapped} bytes, expected {size}")));
        }
        let (store, recording) = (store.clone(), OnceLock::new());
        Ok(Self { metadata, rootfs, disk, memory, memfile, store, recording })
    }

    /// Writes the pages in which this build's memory differs from [`OpenTemplate::open_memfile`]
    /// into the private mapping that a process has of it, before it loads the state. Nothing is
    /// done for a template. A VMM that has its memory served gets all of it from there.
    pub async fn restore_memory(&self, pid: u32) -> Result<(), CreateError> {
        let memory = self.memory.clone();
        if memory.header().is_identity() {
            return Ok(());
        }
        let path = self.memfile.clone();
        let patch = move || pages::patch(pid, &pages::base_memfile(&path, &memory)?, &memory);
        let patched = tokio::task::spawn_blocking(patch).await;
        let bytes = patched.map_err(|e| CreateError::io("restore a memory", std::io::Error::other(e)))??;
        tracing::debug!(pid, bytes, "memory restored");
        Ok(())
    }

    /// Where [`OpenTemplate::open_memfile`] opens.
    pub(crate) fn memfile_path(&self) -> &std::path::Path {
        &self.memfile
    }

    /// The memory file that VMs map, read-only. That of a paused sandbox differs from it: see
    /// [`OpenTemplate::restore_memory`].
    pub fn open_memfile(&self) -> Result<File, CreateError> {
        open(&self.memfile)
    }

    /// The memory, page by page.
    pub fn page_source(&self) -> Arc<dyn PageSource> {
        Arc::new(BuildPages(self.memory.clone()))
    }

    /// Pages that a sandbox needs first, once one has shown it.
    pub fn recording(&self) -> Option<&Recording> {
        self.recording.get()
    }

    /// Keeps the first recording.
    pub fn record(&self, recording: impl FnOnce() -> Recording) {
        self.recording.get_or_init(recording);
    }

    /// The device state, read-only and checked.
    pub async fn open_snapfile(&self) -> Result<File, CreateError> {
        let (store, build) = (self.store.clone(), self.metadata.build_id);
        blocking(move || store.open_artifact(build, Artifact::Snapfile)?.into_checked()).await
    }
}

/// The device that a build's header describes.
async fn mapped(
    store: &LocalStore,
    build: BuildId,
    artifact: Artifact,
    header: Artifact,
) -> Result<Arc<MappedDevice>, CreateError> {
    let (name, text) = (header, store.read(build, header).await?);
    let damaged = |what: String| CreateError::Damaged { build, what };
    let header = Header::parse(&text).map_err(|e| damaged(e.to_string()))?;
    if header.build() != build {
        return Err(damaged(format!("{name} belongs to build {}", header.build())));
    }
    let store = store.clone();
    Ok(Arc::new(MappedDevice::open(header, move |b| store.open_artifact(b, artifact)).await?))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, CreateError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|e| CreateError::io("read a build", std::io::Error::other(e)))??)
}

fn open(path: &std::path::Path) -> Result<File, CreateError> {
    File::open(path).map_err(|e| CreateError::io(format!("open {}", path.display()), e))
}
