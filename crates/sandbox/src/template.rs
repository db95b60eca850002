//! A template opened for use: checked once, then shared by every sandbox made of it.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use nidus_block::header::Header;
use nidus_block::{MappedDevice, ReadDevice};
use nidus_memfs::{MemFs, ServedFile};
use nidus_memory::PageSize;
use nidus_memory::uffd::{PageSource, Recording};
use nidus_storage::{Artifact, BuildArtifact, BuildId, Builds, StorageError};
use nidus_template::TemplateMetadata;
use nidus_vmm::DriverId;

use crate::CreateError;
use crate::factory::MachineSize;
use crate::pages::{BuildMemory, BuildPages};
use crate::served::MemoryError;

/// How sandboxes are made of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// They go on from its memory.
    Restore,
    /// They are booted from its disk; a memory that it may have is left out.
    Boot,
}

/// A build's metadata, its open root disk and its memory; memfile and snapfile are opened anew for
/// each VM, so that no two share a file position.
pub struct OpenTemplate {
    /// How sandboxes are made of it.
    pub(crate) start: Start,
    /// `metadata.json`; of one that is booted, what holds for a guest that begins anew on this node.
    pub metadata: TemplateMetadata,
    /// The read-only root disk.
    pub rootfs: Arc<dyn ReadDevice>,
    /// The disk by its header, which a pause compares with.
    pub(crate) disk: Arc<MappedDevice>,
    /// The memory by its header, likewise; all zeros for one that is booted.
    pub(crate) memory: Arc<MappedDevice>,
    /// The memory as a file, for VMMs that map one.
    memfile: Option<ServedFile>,
    store: Builds,
    /// What the first sandbox needed of it until envd answered.
    recording: OnceLock<Recording>,
}

impl OpenTemplate {
    /// Opens and checks a build: complete, made by this VMM if its state is to be loaded, sizes as the
    /// metadata says. Its memory becomes a file of `memfs`, if there is one.
    pub async fn open(
        store: &Builds,
        build: BuildId,
        start: Start,
        here: &DriverId,
        memfs: Option<Arc<MemFs>>,
    ) -> Result<Self, CreateError> {
        Self::open_as(store, build, start, None, here, memfs).await
    }

    /// Opens a build to be booted as a machine of these sizes.
    pub async fn open_sized(
        store: &Builds,
        build: BuildId,
        size: MachineSize,
        here: &DriverId,
        memfs: Option<Arc<MemFs>>,
    ) -> Result<Self, CreateError> {
        Self::open_as(store, build, Start::Boot, Some(size), here, memfs).await
    }

    async fn open_as(
        store: &Builds,
        build: BuildId,
        start: Start,
        size: Option<MachineSize>,
        here: &DriverId,
        memfs: Option<Arc<MemFs>>,
    ) -> Result<Self, CreateError> {
        if !store.exists(build).await? {
            return Err(CreateError::TemplateNotFound(build));
        }
        let mut metadata = TemplateMetadata::parse(build, &store.read(build, Artifact::Metadata).await?)?;
        let memory = match start {
            Start::Restore if metadata.filesystem_only => return Err(CreateError::DiskAlone(build)),
            Start::Restore => {
                metadata.check_vmm(here)?;
                mapped(store, build, Artifact::Memfile, Artifact::MemfileHeader, None).await?
            }
            Start::Boot => {
                metadata.vmm = here.clone();
                // The envd that it had knew one.
                metadata.guest.iter_mut().for_each(|g| g.access_token = None);
                if let Some(size) = size {
                    (metadata.vcpu, metadata.memory_mb) = (size.vcpu, size.memory_mb);
                    metadata.disk_mb = metadata.disk_mb.max(size.disk_mb);
                }
                zeros(build, u64::from(metadata.memory_mb) << 20).await?
            }
        };
        let grown = size.map(|_| u64::from(metadata.disk_mb) << 20);
        let disk = mapped(store, build, Artifact::Rootfs, Artifact::RootfsHeader, grown).await?;
        let rootfs: Arc<dyn ReadDevice> = disk.clone();
        let damaged = |what: String| CreateError::Damaged { build, what };
        if rootfs.size() != u64::from(metadata.disk_mb) << 20 {
            let size = rootfs.size();
            return Err(damaged(format!("rootfs.ext4 has {size} bytes, expected {} MiB", metadata.disk_mb)));
        }
        if memory.size() != u64::from(metadata.memory_mb) << 20 {
            let size = memory.size();
            return Err(damaged(format!("memfile has {size} bytes, expected {} MiB", metadata.memory_mb)));
        }
        let content = Arc::new(BuildMemory(memory.clone()));
        let memfile = match memfs {
            None => None,
            Some(memfs) => Some(blocking(move || memfs.serve(content).map_err(MemoryError::File)).await?),
        };
        let (store, recording) = (store.clone(), OnceLock::new());
        Ok(Self { start, metadata, rootfs, disk, memory, memfile, store, recording })
    }

    /// Where [`OpenTemplate::open_memfile`] opens; none where VMMs have their memory served.
    pub(crate) fn memfile_path(&self) -> Option<&Path> {
        self.memfile.as_ref().map(ServedFile::path)
    }

    /// The memory file that VMs map, read-only.
    pub async fn open_memfile(self: &Arc<Self>) -> Result<File, CreateError> {
        let this = self.clone();
        let open =
            move || this.memfile.as_ref().ok_or(MemoryError::NoFile)?.open().map_err(MemoryError::File);
        blocking(open).await
    }

    /// Why the memory file could not be read, once that has happened.
    pub fn memfile_failure(&self) -> Option<&str> {
        self.memfile.as_ref().and_then(ServedFile::failure)
    }

    /// The memory, page by page.
    pub fn page_source(&self) -> Arc<dyn PageSource> {
        let page = if self.metadata.huge_pages { PageSize::Huge } else { PageSize::Small };
        Arc::new(BuildPages { memory: self.memory.clone(), page })
    }

    /// Pages that a sandbox needs first, once one has shown it.
    pub fn recording(&self) -> Option<&Recording> {
        self.recording.get()
    }

    /// Keeps the first recording.
    pub fn record(&self, recording: impl FnOnce() -> Recording) {
        self.recording.get_or_init(recording);
    }

    /// Gives the object store the order in which a sandbox read memory and disk, if they are there
    /// and nobody did so before: the next one that opens the build has them sooner.
    pub(crate) async fn save_read_order(&self) {
        for device in [&self.memory, &self.disk] {
            if let Err(e) = device.save_read_order().await {
                tracing::warn!(build = %self.metadata.build_id, "an order of reads is lost: {e}");
            }
        }
    }

    /// The device state, read-only and checked.
    pub async fn open_snapfile(&self) -> Result<File, CreateError> {
        let (store, build) = (self.store.clone(), self.metadata.build_id);
        blocking(move || store.open_file(build, Artifact::Snapfile)).await
    }
}

/// The memory of a guest that is yet to be booted.
async fn zeros(build: BuildId, size: u64) -> Result<Arc<MappedDevice>, CreateError> {
    let header = Header::empty(size, nidus_vmm::PAGE_SIZE)
        .map_err(|e| CreateError::Damaged { build, what: format!("the size of its memory: {e}") })?;
    let nobody = |build| Err::<BuildArtifact, _>(StorageError::NotFound(build));
    Ok(Arc::new(MappedDevice::open(header, nobody).await?))
}

/// The device that a build's header describes, of `grown` bytes if that is said.
pub(crate) async fn mapped(
    store: &Builds,
    build: BuildId,
    artifact: Artifact,
    header: Artifact,
    grown: Option<u64>,
) -> Result<Arc<MappedDevice>, CreateError> {
    let (name, text) = (header, store.read(build, header).await?);
    let damaged = |what: String| CreateError::Damaged { build, what };
    let header = Header::parse(&text).map_err(|e| damaged(e.to_string()))?;
    if header.build() != build {
        return Err(damaged(format!("{name} belongs to build {}", header.build())));
    }
    let header = match grown {
        Some(size) => header.grown(size).map_err(|e| damaged(e.to_string()))?,
        None => header,
    };
    let store = store.clone();
    Ok(Arc::new(MappedDevice::open(header, move |b| store.open_artifact(b, artifact)).await?))
}

async fn blocking<T: Send + 'static, E: Into<CreateError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, CreateError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| CreateError::io("read a build", std::io::Error::other(e)))?.map_err(Into::into)
}
