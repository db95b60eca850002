//! A template opened for use: checked once, then shared by every sandbox made of it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nidus_block::{FileDevice, ReadDevice};
use nidus_memory::uffd::{MappedMemfile, PageSource, Recording};
use nidus_memory::{Memfile, PageSize};
use nidus_storage::{Artifact, BuildId, LocalStore};
use nidus_template::TemplateMetadata;
use nidus_vmm::DriverId;

use tokio::sync::OnceCell;

use crate::CreateError;
use crate::served::MemoryError;

/// A build's metadata and open root disk; memfile and snapfile are opened anew for each VM, so
/// that no two share a file position.
pub struct OpenTemplate {
    /// `metadata.json`.
    pub metadata: TemplateMetadata,
    /// The read-only root disk.
    pub rootfs: Arc<dyn ReadDevice>,
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
        let (memfile, snapfile) = (path(Artifact::Memfile), path(Artifact::Snapfile));
        let rootfs = FileDevice::open(path(Artifact::Rootfs)).await?;
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
        Ok(Self {
            metadata,
            rootfs: Arc::new(rootfs),
            memfile,
            snapfile,
            pages: OnceCell::new(),
            recording: OnceLock::new(),
        })
    }

    /// The memory file, read-only.
    pub fn open_memfile(&self) -> Result<File, CreateError> {
        open(&self.memfile)
    }

    /// The memory, page by page.
    pub async fn page_source(&self) -> Result<Arc<dyn PageSource>, CreateError> {
        let open = || async {
            let path = self.memfile.clone();
            let opened = tokio::task::spawn_blocking(move || {
                let memfile = Memfile::open(path, PageSize::Small, None).map_err(std::io::Error::other)?;
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

fn open(path: &std::path::Path) -> Result<File, CreateError> {
    File::open(path).map_err(|e| CreateError::io(format!("open {}", path.display()), e))
}
