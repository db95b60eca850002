//! Why a sandbox could not be made or ended.

use nidus_block::BlockError;
use nidus_storage::BuildId;
use nidus_template::{DiskError, MetadataError};
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
    Storage(#[from] nidus_storage::StorageError),
    /// A file operation.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
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
