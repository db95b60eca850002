//! Why a sandbox could not be made, saved or ended.

use nidus_block::BlockError;
use nidus_block::header::HeaderError;
use nidus_memory::{MemfileError, PagemapError, PatchError};
use nidus_storage::{BuildId, StorageError};
use nidus_template::{BuildError, DiskError, MetadataError};
use nidus_vmm::VmmError;

use crate::served::MemoryError;

/// Why [`crate::Factory::create`] failed. Whatever had been acquired is released.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Storage has no such build.
    #[error("build {0} is not on this node")]
    TemplateNotFound(BuildId),
    /// The build's artifacts cannot be used here.
    #[error(transparent)]
    Template(#[from] MetadataError),
    /// An artifact is missing or has the wrong size.
    #[error("build {build} is damaged: {what}")]
    Damaged {
        /// The build.
        build: BuildId,
        /// What is wrong with it.
        what: String,
    },
    /// The build has no memory to go on from.
    #[error("build {0} is a disk alone: it must be booted")]
    DiskAlone(BuildId),
    /// There is nothing to boot its disk with.
    #[error("it cannot be booted from its disk: {0}")]
    Boot(#[source] Box<BuildError>),
    /// Cancelled by its caller.
    #[error("creation was cancelled")]
    Cancelled,
    /// The factory is being shut down.
    #[error("this node is shutting down")]
    ShuttingDown,
    /// The guest did not answer.
    #[error("envd did not answer: {0}")]
    Envd(#[from] nidus_envd_protocol::EnvdError),
    /// The VM ended before it was ready.
    #[error("it was not ready yet: {0}")]
    Ended(String),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The disk as the VMM has it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The network slot.
    #[error(transparent)]
    Network(#[from] nidus_network::NetworkError),
    /// The disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl From<BuildError> for CreateError {
    fn from(e: BuildError) -> Self {
        match e {
            BuildError::Cancelled => Self::Cancelled,
            e => Self::Boot(Box::new(e)),
        }
    }
}

impl CreateError {
    /// Whether an artifact is not what was published: another attempt will not help.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Storage(e) | Self::Block(BlockError::Storage(e)) => e.is_damage(),
            _ => false,
        }
    }

    /// Whether the build is sound but stored in a way that is not read here.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Block(BlockError::Compressed { .. }))
    }

    /// A [`CreateError::Io`] with what was being done.
    pub fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}

/// What went wrong while a sandbox was torn down; everything else was released all the same.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Why a sandbox was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The store, which may be full.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file of a build, or the disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The disk as the VMM has it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The header of the new build.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The guest was to write what it has cached of its disk.
    #[error("the guest could not write its cached files to its disk: {0}")]
    Sync(String),
    /// What the guest wrote cannot be told.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The guest's memory cannot be read or changed.
    #[error(transparent)]
    Memory(#[from] PatchError),
    /// The memory file of the template.
    #[error(transparent)]
    Memfile(Box<MemfileError>),
    /// A build that the sandbox was made from was deleted meanwhile.
    #[error("build {0}, which the sandbox was made from, has been deleted")]
    ParentGone(BuildId),
    /// The driver put the memory where it is not looked for.
    #[error("the VMM saved the memory in a way that cannot be stored as a difference ({0})")]
    Where(&'static str),
    /// A file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The guest could not be let run again.
    #[error("{}the sandbox could not run on: {also}", cause.as_ref().map(|c| format!("{c}; and ")).unwrap_or_default())]
    NotResumed {
        /// Why it was not saved, if it was not.
        cause: Option<Box<SaveError>>,
        /// Why it could not run on.
        also: VmmError,
    },
}

impl SaveError {
    pub(crate) fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }

    /// Whether the sandbox runs as before.
    pub fn runs_on(&self) -> bool {
        !matches!(self, Self::NotResumed { .. })
    }
}
