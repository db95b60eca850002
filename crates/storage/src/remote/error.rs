//! What can go wrong with builds in an object store.

use std::{error::Error as _, sync::Arc, time::Duration};

use object_store::client::{HttpError, HttpErrorKind};

use super::{frame::FrameError, manifest::ManifestError, order::OrderError};
use crate::{Artifact, BuildId, StorageError};

/// Why an operation on the object store failed. Clones share their sources: one failed fetch can
/// be the answer to many reads.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RemoteError {
    /// The URL or its options name no object store.
    #[error("{url:?} names no object store: {reason}")]
    Url {
        /// The URL as it was given.
        url: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// Nobody answered, or not in time.
    #[error(
        "cannot reach {store} to {action} {object}: {source}. \
         Check the endpoint, the network and whether the server runs"
    )]
    Unreachable {
        /// The store's URL.
        store: Arc<str>,
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to, below the store's URL.
        object: String,
        /// The client's report.
        source: Arc<object_store::Error>,
    },
    /// The store knows who asks, or not, and refuses.
    #[error(
        "{store} denied access to {action} {object}: {source}. \
         Check the keys, and that they may list, read, write and delete there"
    )]
    Denied {
        /// The store's URL.
        store: Arc<str>,
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to, below the store's URL.
        object: String,
        /// The client's report.
        source: Arc<object_store::Error>,
    },
    /// The bucket does not exist.
    #[error("the bucket of {store} does not exist. Create it, or correct the URL or the region")]
    NoBucket {
        /// The store's URL.
        store: Arc<str>,
    },
    /// The store failed in another way.
    #[error("{store} failed to {action} {object}: {source}")]
    Store {
        /// The store's URL.
        store: Arc<str>,
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to, below the store's URL.
        object: String,
        /// The client's report.
        source: Arc<object_store::Error>,
    },
    /// The operation did not end within its time limit, retries included.
    #[error("{store} did not {action} {object} within {} s", limit.as_secs())]
    TimedOut {
        /// The store's URL.
        store: Arc<str>,
        /// What was being done, as an infinitive.
        action: &'static str,
        /// What it was done to, below the store's URL.
        object: String,
        /// The limit.
        limit: Duration,
    },
    /// No build of this id is in the store.
    #[error("build {0} does not exist in the object store")]
    NotFound(BuildId),
    /// The build has no such artifact.
    #[error("build {build} has no {artifact} in the object store")]
    NoArtifact {
        /// The build.
        build: BuildId,
        /// What it lacks.
        artifact: Artifact,
    },
    /// The manifest is damaged, or of a version that this program does not know.
    #[error("the manifest of build {build} cannot be used: {source}")]
    Manifest {
        /// The build.
        build: BuildId,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A frame is not what was uploaded, neither at the first nor at the second fetch.
    #[error("{artifact} of build {build} is damaged in the object store: frame {frame} {source}")]
    Damaged {
        /// The build.
        build: BuildId,
        /// The artifact.
        artifact: Artifact,
        /// The frame's number: its offset in the artifact divided by the frame size.
        frame: u32,
        /// What is wrong with it.
        source: FrameError,
    },
    /// A recorded access order is damaged.
    #[error("the recorded order of {artifact} of build {build} cannot be used: {source}")]
    Order {
        /// The build.
        build: BuildId,
        /// The artifact.
        artifact: Artifact,
        /// What is wrong with it.
        source: OrderError,
    },
    /// Something removed an object while its build was being uploaded. Uploading again puts it back.
    #[error("{object} of build {build} vanished while the build was uploaded; upload it again")]
    Vanished {
        /// The build.
        build: BuildId,
        /// The object, below the store's URL.
        object: String,
    },
    /// The range is not within the artifact.
    #[error("{len} bytes at {offset} are not within the {size} bytes of {artifact} of build {build}")]
    OutOfRange {
        /// The build.
        build: BuildId,
        /// The artifact.
        artifact: Artifact,
        /// Where the range begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The artifact's size in bytes.
        size: u64,
    },
    /// The disk on this side failed.
    #[error(transparent)]
    Local(Arc<StorageError>),
    /// The runtime was stopped before the operation was done.
    #[error("the runtime was shut down before it could {action}")]
    Shutdown {
        /// What was to be done, as an infinitive.
        action: &'static str,
    },
}

impl From<StorageError> for RemoteError {
    fn from(e: StorageError) -> Self {
        Self::Local(Arc::new(e))
    }
}

impl RemoteError {
    /// Sorts a failure of the client into what its reader can do about it.
    pub(crate) fn client(
        store: &Arc<str>,
        action: &'static str,
        object: String,
        source: object_store::Error,
    ) -> Self {
        use object_store::Error as E;
        let store = store.clone();
        // Only the text of the answer says it: S3's code, GCS's message.
        let text = source.to_string();
        if text.contains("NoSuchBucket") || text.contains("specified bucket does not exist") {
            return Self::NoBucket { store };
        }
        // Listings have no error of their own for it.
        let denied = matches!(source, E::PermissionDenied { .. } | E::Unauthenticated { .. })
            || text.contains("status code: 403")
            || text.contains("status code: 401");
        let unreachable = is_unreachable(&source);
        let source = Arc::new(source);
        if denied {
            Self::Denied { store, action, object, source }
        } else if unreachable {
            Self::Unreachable { store, action, object, source }
        } else {
            Self::Store { store, action, object, source }
        }
    }

    /// Whether the store says that the object is not there.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Store { source, .. } if matches!(**source, object_store::Error::NotFound { .. }))
    }

    /// Whether the build cannot be used as it is, now or later.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Manifest { .. } | Self::NoArtifact { .. } => true,
            Self::Local(e) => e.is_damage(),
            _ => false,
        }
    }

    /// Whether trying again later may help without anyone having repaired anything.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Vanished { .. } => true,
            Self::Store { .. } => !self.is_absent(),
            _ => false,
        }
    }
}

fn is_unreachable(error: &object_store::Error) -> bool {
    let mut cause = error.source();
    while let Some(e) = cause {
        if let Some(http) = e.downcast_ref::<HttpError>() {
            return matches!(
                http.kind(),
                HttpErrorKind::Connect | HttpErrorKind::Timeout | HttpErrorKind::Interrupted
            );
        }
        cause = e.source();
    }
    false
}
