//! Builds' artifacts as seen by devices, wherever they are.

use std::sync::Arc;

use nidus_storage::{
    BuildArtifact, StorageError,
    remote::{ReadAhead, RemoteArtifact, RemoteError},
};

use crate::{BlockError, checked::CheckedFile};

/// An artifact with positioned reads whose bytes are those that were published.
#[derive(Debug)]
pub(crate) enum Source {
    /// On this host's disk.
    Local(Arc<CheckedFile>),
    /// In an object store: what is read is fetched, and kept for a while.
    Remote { artifact: RemoteArtifact, _ahead: Option<ReadAhead> },
}

impl Source {
    /// Fills `buf` if that needs no waiting.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        match self {
            Self::Local(file) => file.try_read(offset, buf),
            Self::Remote { artifact, .. } => artifact.try_read_at(offset, buf).map_err(remote),
        }
    }

    /// Fills `buf`.
    pub(crate) async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        match self {
            Self::Local(file) => file.read(offset, buf).await,
            Self::Remote { artifact, .. } => artifact.read_at(offset, buf).await.map_err(remote),
        }
    }

    /// Fills `buf` on this thread, which waits for the disk or the network.
    pub(crate) fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        match self {
            Self::Local(file) => file.read_blocking(offset, buf),
            Self::Remote { artifact, .. } => artifact.read_blocking(offset, buf).map_err(remote),
        }
    }
}

impl From<BuildArtifact> for Source {
    fn from(artifact: BuildArtifact) -> Self {
        match artifact {
            BuildArtifact::Local(file) => Self::Local(Arc::new(CheckedFile::new(file))),
            BuildArtifact::Remote { artifact, ahead } => Self::Remote { artifact, _ahead: ahead },
        }
    }
}

fn remote(error: RemoteError) -> BlockError {
    StorageError::from(error).into()
}
