//! A template opened for use: checked once, then shared by every sandbox made of it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nidus_block::header::Header;
use nidus_block::{FileDevice, MappedDevice, ReadDevice};
use nidus_memory::uffd::{MappedMemfile, PageSource, Recording};
use nidus_memory::{Memfile, PageSize};
use nidus_storage::{Artifact, BuildId, LocalStore};
use nidus_template::TemplateMetadata;
use nidus_vmm::DriverId;

use tokio::sync::OnceCell;

use crate::pages::BuildPages;
use crate::served::MemoryError;
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
    snapfile: PathBuf,
    /// The memory for VMMs that have it served, mapped once for all.
    pages: OnceCell<Arc<dyn PageSource>>,
    /// What the first sandbox needed of it until envd answered.
    recording: OnceLock<Recording>,
}

impl OpenTemplate {
    /// Opens and checks a build: complete, made by this VMM, sizes as the metadata says.
    pub async fn open(store: &LocalStore, build: BuildId, here: &DriverId) -> Result<Self, CreateError> {
        if !store.exists(build).await? {
            return Err(CreateError::TemplateNotFound(build));
        }
        let path = |a| store.path(build, a);
        let file = path(Artifact::Metadata);
        let text = tokio::fs::read(&file)
            .await
            .map_err(|e| CreateError::io(format!("read {}", file.display()), e))?;
        let metadata = TemplateMetadata::parse(build, &text)?;
        metadata.check_vmm(here)?;
        let memory = mapped(store, build, Artifact::Memfile, Artifact::MemfileHeader).await?;
        let disk = mapped(store, build, Artifact::Rootfs, Artifact::RootfsHeader).await?;
        let base = memory.header().base();
        let (memfile, snapfile) = (store.path(base, Artifact::Memfile), path(Artifact::Snapfile));
        let rootfs: Arc<dyn ReadDevice> = match disk.header().is_identity() {
            true => Arc::new(FileDevice::open(path(Artifact::Rootfs)).await?),
            false => disk.clone(),
        };
        let damaged = |what: String| CreateError::Damaged { build, what };
        let size = tokio::fs::metadata(&memfile)
            .await
            .map_err(|e| CreateError::io(format!("look at {}", memfile.display()), e))?
            .len();
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
        let (pages, recording) = (OnceCell::new(), OnceLock::new());
        Ok(Self { metadata, rootfs, disk, memory, memfile, snapfile, pages, recording })
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
    pub async fn page_source(&self) -> Result<Arc<dyn PageSource>, CreateError> {
        if !self.memory.header().is_identity() {
            return Ok(Arc::new(BuildPages(self.memory.clone())));
        }
        let open = || async {
            let path = self.memfile.clone();
            let pages = if self.metadata.huge_pages { PageSize::Huge } else { PageSize::Small };
            let opened = tokio::task::spawn_blocking(move || {
                let memfile = Memfile::open(path, pages, None).map_err(std::io::Error::other)?;
                MappedMemfile::open(&memfile)
            });
            let opened = opened.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
            let source: Arc<dyn PageSource> = Arc::new(opened.map_err(MemoryError::Source)?);
            Ok::<_, CreateError>(source)
        };
        self.pages.get_or_try_init(open).await.cloned()
    }

    /// Pages that a sandbox needs first, once one has shown it.
    pub fn recording(&self) -> Option<&Recording> {
        self.recording.get()
    }

    /// Keeps the first recording.
    pub fn record(&self, recording: impl FnOnce() -> Recording) {
        self.recording.get_or_init(recording);
    }

    /// The device state, read-only.
    pub fn open_snapfile(&self) -> Result<File, CreateError> {
        open(&self.snapfile)
    }
}

/// The device that a build's header describes.
async fn mapped(
    store: &LocalStore,
    build: BuildId,
    artifact: Artifact,
    header: Artifact,
) -> Result<Arc<MappedDevice>, CreateError> {
    let path = store.path(build, header);
    let text =
        tokio::fs::read(&path).await.map_err(|e| CreateError::io(format!("read {}", path.display()), e))?;
    let damaged = |what: String| CreateError::Damaged { build, what };
    let header = Header::parse(&text).map_err(|e| damaged(e.to_string()))?;
    if header.build() != build {
        return Err(damaged(format!("{} belongs to build {}", path.display(), header.build())));
    }
    let store = store.clone();
    Ok(Arc::new(MappedDevice::open(header, move |b| store.path(b, artifact)).await?))
}

fn open(path: &std::path::Path) -> Result<File, CreateError> {
    File::open(path).map_err(|e| CreateError::io(format!("open {}", path.display()), e))
}
