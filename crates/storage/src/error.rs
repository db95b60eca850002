//! What can go wrong with stored builds.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{Artifact, BuildId, remote::RemoteError};

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The file system (or the quota) has no room left.
    #[error("no space left on the disk to {action} {}", path.display())]
    DiskFull {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A build is published once and never replaced.
    #[error("build {0} is already published")]
    AlreadyExists(BuildId),
    /// No published build has this id.
    #[error("build {0} does not exist")]
    NotFound(BuildId),
    /// The nil id stands for zeros in headers and can name no build.
    #[error("the nil id cannot name a build")]
    NilId,
    /// The staged build lacks an artifact that every build has.
    #[error("build {build} cannot be published without its {artifact}")]
    Incomplete {
        /// The build.
        build: BuildId,
        /// What is missing.
        artifact: Artifact,
    },
    /// The staging directory holds something that is not a plain file of its own with an artifact's name.
    #[error("build {build} cannot be published: {name:?} in its staging directory is not an artifact")]
    Unexpected {
        /// The build.
        build: BuildId,
        /// The name in question.
        name: std::ffi::OsString,
    },
    /// The build was published without this artifact.
    #[error("build {build} has no {artifact}")]
    NoArtifact {
        /// The build.
        build: BuildId,
        /// What it lacks.
        artifact: Artifact,
    },
    /// An artifact's bytes are not those that were published.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The build has no sums to check its artifacts by.
    #[error(
        "build {0} has no checksums, as an older nidus made it; it cannot be used, build the template again (nidus template build)"
    )]
    Unchecked(BuildId),
    /// The object store.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The runtime was stopped before the operation ran.
    #[error("the store was shut down before it could {action}")]
    Shutdown {
        /// What was to be done, as an infinitive.
        action: &'static str,
    },
}

impl StorageError {
    /// The error for a failed system call; a full disk is told apart from the rest.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { action, path },
            _ => Self::Io { action, path, source },
        }
    }

    /// Whether the build cannot be used as it is, now or later.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged(_) | Self::Unchecked(_) | Self::NoArtifact { .. } => true,
            Self::Remote(e) => e.is_damage(),
            _ => false,
        }
    }

    /// Whether the build was made without this artifact.
    pub fn lacks_artifact(&self) -> bool {
        matches!(self, Self::NoArtifact { .. } | Self::Remote(RemoteError::NoArtifact { .. }))
    }

    /// Whether the cause is a full disk.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Remote(RemoteError::Local(e)) => e.is_disk_full(),
            _ => false,
        }
    }
}

/// An artifact whose bytes are not those that were published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{artifact} of build {build} is damaged{what}")]
pub struct Damaged {
    /// The build.
    pub build: BuildId,
    /// Which of its artifacts.
    pub artifact: Artifact,
    what: Damage,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Damage {
    #[error(" at offset {0}: the checksum is wrong")]
    Block(u64),
    #[error(": it has {found} bytes instead of {expected}")]
    Length { found: u64, expected: u64 },
    #[error(": it is missing")]
    Missing,
    #[error(": {0}")]
    Sums(&'static str),
}

impl Damaged {
    /// A block whose checksum is wrong.
    pub(crate) fn block(build: BuildId, artifact: Artifact, offset: u64) -> Self {
        Self { build, artifact, what: Damage::Block(offset) }
    }

    /// A file that was cut or extended.
    pub(crate) fn length(build: BuildId, artifact: Artifact, found: u64, expected: u64) -> Self {
        Self { build, artifact, what: Damage::Length { found, expected } }
    }

    /// An artifact that is not there.
    pub(crate) fn missing(build: BuildId, artifact: Artifact) -> Self {
        Self { build, artifact, what: Damage::Missing }
    }

    /// Sums that cannot be used.
    pub(crate) fn sums(build: BuildId, why: &'static str) -> Self {
        Self { build, artifact: Artifact::Checksums, what: Damage::Sums(why) }
    }

    /// Where the damaged block begins, in bytes, if one was found.
    pub fn offset(&self) -> Option<u64> {
        match self.what {
            Damage::Block(offset) => Some(offset),
            _ => None,
        }
    }
}

/// Runs `work`, which blocks on the disk, away from the runtime's own threads.
pub(crate) async fn blocking<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(StorageError::Shutdown { action }),
        },
    }
}
