//! A template opened for use: checked once, then shared by every sandbox made of it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use nidus_block::{FileDevice, ReadDevice};
use nidus_storage::{Artifact, BuildId, LocalStore};
use nidus_template::TemplateMetadata;
use nidus_vmm::DriverId;

use crate::CreateError;

/// A build's metadata and open root disk; memfile and snapfile are opened anew for each VM, so
/// that no two share a file position.
pub struct OpenTemplate {
    /// `metadata.json`.
    pub metadata: TemplateMetadata,
    /// The read-only root disk.
    pub rootfs: Arc<dyn ReadDevice>,
    memfile: PathBuf,
    snapfile: PathBuf,
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
        Ok(Self { metadata, rootfs: Arc::new(rootfs), memfile, snapfile })
    }

    /// The memory file, read-only.
    pub fn open_memfile(&self) -> Result<File, CreateError> {
        open(&self.memfile)
    }

    /// The device state, read-only.
    pub fn open_snapfile(&self) -> Result<File, CreateError> {
        open(&self.snapfile)
    }
}

fn open(path: &std::path::Path) -> Result<File, CreateError> {
    File::open(path).map_err(|e| CreateError::io(format!("open {}", path.display()), e))
}
