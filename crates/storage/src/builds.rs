//! All builds that this node can use: those on its disk and those in the object store.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::libc::O_TMPFILE;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    Artifact, ArtifactFile, BuildId, LocalStore, StagedBuild, StorageError,
    error::blocking,
    remote::{ReadAhead, RemoteArtifact, RemoteBuild, RemoteError, RemoteReader, RemoteTask, Uploader},
};

/// The most bytes of an artifact that are fetched ahead of need.
const AHEAD: u64 = 256 << 20;

/// A local store and, if there is one, the object store behind it. Clones share both.
///
/// What is published here is queued for the object store; what is not here is read from there, on
/// demand. Where a build is does not change what is read of it.
#[derive(Debug, Clone)]
pub struct Builds {
    local: LocalStore,
    remote: Option<Arc<Remote>>,
}

#[derive(Debug)]
struct Remote {
    reader: RemoteReader,
    uploader: Uploader,
}

impl Remote {
    /// Whether the object store has the build and is to keep it.
    async fn has(&self, build: BuildId) -> Result<bool, StorageError> {
        Ok(!self.uploader.is_doomed(build) && self.reader.store().exists(build).await?)
    }
}

/// An artifact that is open for reading, wherever it is.
#[derive(Debug)]
pub enum BuildArtifact {
    /// On this node's disk.
    Local(ArtifactFile),
    /// In the object store.
    Remote {
        /// The artifact.
        artifact: RemoteArtifact,
        /// What is fetched of it ahead of need, until this is dropped.
        ahead: Option<ReadAhead>,
    },
}

impl BuildArtifact {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Local(file) => file.size(),
            Self::Remote { artifact, .. } => artifact.size(),
        }
    }

    /// Where it is, for messages.
    pub fn location(&self) -> PathBuf {
        match self {
            Self::Local(file) => file.path().to_owned(),
            Self::Remote { artifact, .. } => Path::new("data").join(artifact.to_string()),
        }
    }
}

/// Where another node that asks for an artifact finds it.
#[derive(Debug)]
pub enum Held {
    /// On this node's disk, and not in the object store yet.
    Here(ArtifactFile),
    /// In the object store, as far as this node knows.
    Uploaded,
    /// Not on this node's disk: its build is not, or has no such artifact.
    Nowhere,
}

impl From<ArtifactFile> for BuildArtifact {
    fn from(file: ArtifactFile) -> Self {
        Self::Local(file)
    }
}

impl From<LocalStore> for Builds {
    fn from(local: LocalStore) -> Self {
        Self { local, remote: None }
    }
}

impl Builds {
    /// Those in a local store at `root` alone: see [`LocalStore::open`].
    pub fn open(root: impl AsRef<Path>) -> Result<Self, StorageError> {
        LocalStore::open(root).map(Self::from)
    }

    /// Those in a local store and those that `reader` reads. `uploader` brings the first to the second.
    pub fn with_remote(local: LocalStore, reader: RemoteReader, uploader: Uploader) -> Self {
        Self { local, remote: Some(Arc::new(Remote { reader, uploader })) }
    }

    /// The builds on this node's disk.
    pub fn local(&self) -> &LocalStore {
        &self.local
    }

    /// What reads the object store, if there is one.
    pub fn reader(&self) -> Option<&RemoteReader> {
        self.remote.as_ref().map(|r| &r.reader)
    }

    /// What reads and what writes the object store, if there is one.
    pub(crate) fn remote_side(&self) -> Option<(&RemoteReader, &Uploader)> {
        self.remote.as_ref().map(|r| (&r.reader, &r.uploader))
    }

    /// Whether there is such a build.
    pub async fn exists(&self, build: BuildId) -> Result<bool, StorageError> {
        match &self.remote {
            _ if self.local.exists(build).await? => Ok(true),
            Some(remote) => remote.has(build).await,
            None => Ok(false),
        }
    }

    /// All builds, in the order of their ids.
    pub async fn list(&self) -> Result<Vec<BuildId>, StorageError> {
        let mut builds = self.local.list().await?;
        if let Some(remote) = &self.remote {
            let there = remote.reader.store().list().await?;
            builds.extend(there.into_iter().filter(|b| !remote.uploader.is_doomed(*b)));
            builds.sort_unstable();
            builds.dedup();
        }
        Ok(builds)
    }

    /// Reads a small artifact as a whole, checked.
    ///
    /// Fails as [`Builds::open_artifact`] does.
    pub async fn read(&self, build: BuildId, artifact: Artifact) -> Result<Vec<u8>, StorageError> {
        match self.remote(build).await? {
            None => self.local.read(build, artifact).await,
            Some(remote) => Ok(remote.artifact(artifact)?.read_all().await?),
        }
    }

    /// Opens an artifact for reading. Blocks, and so must not run on a thread of the runtime.
    ///
    /// Of a memory or a disk in the object store, what an earlier reader needed first is fetched ahead.
    ///
    /// Fails with [`StorageError::NotFound`] if the build is nowhere, as
    /// [`LocalStore::open_artifact`] does if it is here, and with [`StorageError::Remote`] otherwise.
    pub fn open_artifact(&self, build: BuildId, artifact: Artifact) -> Result<BuildArtifact, StorageError> {
        match self.remote_blocking(build)? {
            None => Ok(self.local.open_artifact(build, artifact)?.into()),
            Some(remote) => {
                let is_large = matches!(artifact, Artifact::Memfile | Artifact::Rootfs);
                let artifact = remote.artifact(artifact)?;
                let ahead = is_large.then(|| artifact.read_ahead_as_recorded(AHEAD));
                Ok(BuildArtifact::Remote { artifact, ahead })
            }
        }
    }

    /// Opens an artifact as a file that was checked as a whole, for those that read it themselves.
    /// One that is in the object store is fetched into a file without a name. Blocks, and so must not
    /// run on a thread of the runtime.
    pub fn open_file(&self, build: BuildId, artifact: Artifact) -> Result<File, StorageError> {
        let (Some(remote), Some(side)) = (self.remote_blocking(build)?, &self.remote) else {
            return self.local.open_artifact(build, artifact)?.into_checked();
        };
        let root = self.local.root();
        let file = File::options().read(true).write(true).mode(0o600).custom_flags(O_TMPFILE).open(root);
        let file = Arc::new(file.map_err(|e| StorageError::io("create a file in", root, e))?);
        side.reader.runtime().block_on(remote.copy_to(artifact, &file, root))?;
        // A VMM takes an open file only in the mode in which it would have opened it.
        let own = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        File::open(&own).map_err(|e| StorageError::io("open", &own, e))
    }

    /// Where another node finds an artifact of a build on this node's disk. While the object store cannot
    /// be asked, that is here.
    ///
    /// Fails as [`LocalStore::open_artifact`] does for a damaged build.
    pub async fn held(&self, build: BuildId, artifact: Artifact) -> Result<Held, StorageError> {
        let local = self.local.clone();
        let find = move || local.find_artifact(build, artifact);
        let Some(file) = blocking("open an artifact", find).await? else { return Ok(Held::Nowhere) };
        let Some(remote) = &self.remote else { return Ok(Held::Here(file)) };
        let queued = remote.uploader.pending().await?;
        match queued.into_iter().find(|(b, _)| *b == build) {
            Some((_, RemoteTask::Remove)) => Ok(Held::Nowhere),
            Some((_, RemoteTask::Upload)) => Ok(Held::Here(file)),
            _ => match remote.has(build).await {
                Ok(true) => Ok(Held::Uploaded),
                Ok(false) => Ok(Held::Here(file)),
                Err(error) => {
                    warn!(%build, %error, "serving a build to another node");
                    Ok(Held::Here(file))
                }
            },
        }
    }

    /// Begins to write a build: see [`LocalStore::stage`]. Its publication queues it for the object
    /// store.
    pub async fn stage(&self, build: BuildId) -> Result<StagedBuild, StorageError> {
        Ok(self.queued(self.local.stage(build).await?))
    }

    /// Begins to write a build on this node's disk again: see [`LocalStore::stage_again`]. Blocks.
    pub fn stage_again(&self, build: BuildId) -> Result<StagedBuild, StorageError> {
        Ok(self.queued(self.local.stage_again(build)?))
    }

    /// Publishes what [`Builds::stage_again`] began: see [`LocalStore::replace`]. Blocks.
    pub fn replace(&self, staged: StagedBuild) -> Result<(), StorageError> {
        self.local.replace(staged)
    }

    /// Removes a build here, and queues its removal from the object store.
    ///
    /// Fails with [`StorageError::NotFound`] if it is nowhere.
    pub async fn remove(&self, build: BuildId) -> Result<(), StorageError> {
        let Some(remote) = self.remote.clone() else { return self.local.remove(build).await };
        let is_here = self.local.exists(build).await?;
        if !is_here && !remote.has(build).await? {
            return Err(StorageError::NotFound(build));
        }
        // First: a build that is gone here must not stay there because this process died.
        remote.uploader.add(build, RemoteTask::Remove).await?;
        if is_here {
            self.local.remove(build).await?;
        }
        blocking("remove cached frames", move || {
            remote.reader.forget(build);
            Ok(())
        })
        .await
    }

    /// See [`LocalStore::reclaim`].
    pub async fn reclaim(&self) -> Result<usize, StorageError> {
        self.local.reclaim().await
    }

    /// Brings what is published here into the object store, until `stop` and then for up to `grace`.
    /// Begins with what an earlier process left undone. Returns at once if there is no object store.
    pub async fn upload(&self, stop: CancellationToken, grace: Duration) {
        let Some(remote) = &self.remote else { return };
        tokio::select! {
            added = remote.uploader.add_missing() => match added {
                Ok(0) => {}
                Ok(count) => info!(count, "builds are to be uploaded"),
                Err(error) => warn!(%error, "cannot compare the builds here with the object store's"),
            },
            () = stop.cancelled() => return,
        }
        remote.uploader.run(stop, grace).await;
    }

    fn queued(&self, staged: StagedBuild) -> StagedBuild {
        match &self.remote {
            None => staged,
            Some(remote) => staged.then_upload(remote.uploader.clone()),
        }
    }

    /// The build in the object store, unless it is here or there is none.
    async fn remote(&self, build: BuildId) -> Result<Option<RemoteBuild>, StorageError> {
        match &self.remote {
            Some(remote) if !self.local.exists(build).await? => {
                if remote.uploader.is_doomed(build) {
                    return Err(StorageError::NotFound(build));
                }
                match remote.reader.open(build).await {
                    Err(RemoteError::NotFound(build)) => Err(StorageError::NotFound(build)),
                    result => Ok(Some(result?)),
                }
            }
            _ => Ok(None),
        }
    }

    fn remote_blocking(&self, build: BuildId) -> Result<Option<RemoteBuild>, StorageError> {
        match &self.remote {
            Some(remote) => remote.reader.runtime().block_on(self.remote(build)),
            None => Ok(None),
        }
    }
}
