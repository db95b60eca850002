//! The store over a local directory: `{root}/{build id}/{artifact}`.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::SystemTime,
};

use parking_lot::{Mutex, RwLock};
use tracing::warn;
use uuid::Uuid;

use crate::{
    Artifact, ArtifactFile, BuildId, StagedBuild, StorageError, checked, checksums::Checksums,
    error::blocking,
};

/// Holds what is being written or removed. Its name is no build id, and it lies beside the builds
/// so that a rename between the two never crosses a file system.
const STAGING: &str = ".staging";

/// Published builds in a local directory. Clones share the directory.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: Arc<Path>,
    /// Those of builds in use: a template's are a thousandth of its size, and all its sandboxes'.
    sums: Arc<Mutex<HashMap<BuildId, Weak<Checksums>>>>,
    /// Held shared while an artifact and its sums are opened, exclusively while a build is replaced.
    swaps: Arc<RwLock<()>>,
}

impl LocalStore {
    /// Opens the store at `root` and makes its directories (mode 0700) if they are absent.
    ///
    /// Blocks for a few system calls. Several processes may have one store open; only
    /// [`LocalStore::reclaim`] needs the caller to be alone.
    pub fn open(root: impl AsRef<Path>) -> Result<Self, StorageError> {
        let root = root.as_ref();
        let staging = root.join(STAGING);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&staging)
            .map_err(|e| StorageError::io("create the directory", &staging, e))?;
        // Builds hold what guests had in memory, and their tokens. A VMM gets files that are open, and
        // must find no other guest's by their names.
        for dir in [root, &staging] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
                .map_err(|e| StorageError::io("set the mode of", dir, e))?;
        }
        let root = fs::canonicalize(root).map_err(|e| StorageError::io("resolve", root, e))?;
        Ok(Self { root: root.into(), sums: Arc::default(), swaps: Arc::default() })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a published build, whether it exists or not.
    pub fn dir(&self, build: BuildId) -> PathBuf {
        self.root.join(build.to_string())
    }

    /// Where an artifact of a published build lies, whether it exists or not.
    pub fn path(&self, build: BuildId, artifact: Artifact) -> PathBuf {
        self.dir(build).join(artifact.file_name())
    }

    /// Whether the build is published. A build that is being written or removed is not.
    pub async fn exists(&self, build: BuildId) -> Result<bool, StorageError> {
        let path = self.path(build, Artifact::Metadata);
        blocking("look for a build", move || is_there(&path)).await
    }

    /// The published builds, in the order of their ids.
    pub async fn list(&self) -> Result<Vec<BuildId>, StorageError> {
        let root = self.root.clone();
        blocking("list the builds", move || {
            let mut builds = Vec::new();
            for entry in read_dir(&root)? {
                let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
                let Ok(build) = name.parse::<BuildId>() else { continue };
                if build.to_string() == name && is_there(&entry.path().join(Artifact::Metadata.file_name()))?
                {
                    builds.push(build);
                }
            }
            builds.sort_unstable();
            Ok(builds)
        })
        .await
    }

    /// The published builds, those that were published first at the front.
    pub(crate) async fn list_by_age(&self) -> Result<Vec<BuildId>, StorageError> {
        let (store, builds) = (self.clone(), self.list().await?);
        blocking("list the builds", move || {
            // One that is removed meanwhile has no age any more.
            let age =
                |b: &BuildId| fs::metadata(store.path(*b, Artifact::Metadata)).and_then(|m| m.modified());
            let mut builds: Vec<_> = builds.into_iter().filter_map(|b| Some((age(&b).ok()?, b))).collect();
            builds.sort_unstable();
            Ok(builds.into_iter().map(|(_, b)| b).collect())
        })
        .await
    }

    /// What a published build takes on the disk, in bytes, and when it was published; `None` if there is
    /// no such build. Blocks.
    pub fn usage(&self, build: BuildId) -> Result<Option<(u64, SystemTime)>, StorageError> {
        let dir = self.dir(build);
        let usage = || {
            let published = fs::metadata(self.path(build, Artifact::Metadata))?.modified()?;
            let mut bytes = 0;
            for entry in fs::read_dir(&dir)? {
                bytes += entry?.metadata()?.blocks() * 512;
            }
            Ok((bytes, published))
        };
        match usage() {
            Err(e) if io::Error::kind(&e) == io::ErrorKind::NotFound => Ok(None),
            result => result.map(Some).map_err(|e| StorageError::io("inspect", &dir, e)),
        }
    }

    /// Opens an artifact of a published build for reading. Blocks.
    ///
    /// Fails with [`StorageError::NotFound`] if there is no such build, with
    /// [`StorageError::Unchecked`] if it was published without sums, with [`StorageError::Damaged`] if
    /// the artifact is missing or not as long as it was.
    pub fn open_artifact(&self, build: BuildId, artifact: Artifact) -> Result<ArtifactFile, StorageError> {
        if !is_there(&self.dir(build))? {
            return Err(StorageError::NotFound(build));
        }
        let _no_swap = self.swaps.read();
        ArtifactFile::open(self.path(build, artifact), artifact, self.sums(build)?)
    }

    /// Opens an artifact if the build is published here and has it. Blocks.
    ///
    /// Fails as [`LocalStore::open_artifact`] does for a damaged build.
    pub fn find_artifact(
        &self,
        build: BuildId,
        artifact: Artifact,
    ) -> Result<Option<ArtifactFile>, StorageError> {
        let find = || {
            let _no_swap = self.swaps.read();
            let sums = self.sums(build)?;
            let has_it = sums.artifacts.iter().any(|(a, _)| *a == artifact);
            has_it.then(|| ArtifactFile::open(self.path(build, artifact), artifact, sums)).transpose()
        };
        // Looked for last: it may have been removed meanwhile.
        match find() {
            Err(_) if !is_there(&self.dir(build))? => Ok(None),
            result => result,
        }
    }

    /// Opens all artifacts of a published build as they are at one time, whether or not the build is
    /// replaced afterwards. Blocks.
    ///
    /// Fails as [`LocalStore::open_artifact`] does.
    pub(crate) fn open_build(&self, build: BuildId) -> Result<Vec<ArtifactFile>, StorageError> {
        if !is_there(&self.dir(build))? {
            return Err(StorageError::NotFound(build));
        }
        let _no_swap = self.swaps.read();
        let sums = self.sums(build)?;
        let all = sums.artifacts.iter().map(|(artifact, _)| *artifact);
        all.map(|a| ArtifactFile::open(self.path(build, a), a, sums.clone())).collect()
    }

    /// Reads a small artifact of a published build as a whole, and checks it.
    pub async fn read(&self, build: BuildId, artifact: Artifact) -> Result<Vec<u8>, StorageError> {
        let store = self.clone();
        blocking("read an artifact", move || store.open_artifact(build, artifact)?.read_all()).await
    }

    fn sums(&self, build: BuildId) -> Result<Arc<Checksums>, StorageError> {
        if let Some(sums) = self.sums.lock().get(&build).and_then(Weak::upgrade) {
            return Ok(sums);
        }
        let sums = Arc::new(checked::load(build, &self.path(build, Artifact::Checksums))?);
        let mut all = self.sums.lock();
        all.retain(|_, sums| sums.strong_count() > 0);
        all.insert(build, Arc::downgrade(&sums));
        Ok(sums)
    }

    /// Begins to write a build, in a staging directory (mode 0700) of its own.
    ///
    /// Fails with [`StorageError::AlreadyExists`] if the build is already published. Two stagings
    /// of one build may be under way at once: the first to commit wins.
    pub async fn stage(&self, build: BuildId) -> Result<StagedBuild, StorageError> {
        if build.is_nil() {
            return Err(StorageError::NilId);
        }
        let store = self.clone();
        blocking("stage a build", move || {
            if is_there(&store.path(build, Artifact::Metadata))? {
                return Err(StorageError::AlreadyExists(build));
            }
            store.new_staging(build)
        })
        .await
    }

    /// Begins to write a published build again: with the same contents, stored in another way. Blocks.
    pub fn stage_again(&self, build: BuildId) -> Result<StagedBuild, StorageError> {
        if !is_there(&self.path(build, Artifact::Metadata))? {
            return Err(StorageError::NotFound(build));
        }
        self.new_staging(build)
    }

    /// Publishes what [`LocalStore::stage_again`] began, in the place of what is there: all or nothing,
    /// for everyone who opens an artifact from then on. Blocks.
    pub fn replace(&self, staged: StagedBuild) -> Result<(), StorageError> {
        let build = staged.build();
        staged.replace(|| {
            let swap = self.swaps.write();
            self.sums.lock().remove(&build);
            swap
        })
    }

    fn new_staging(&self, build: BuildId) -> Result<StagedBuild, StorageError> {
        let dir = self.staging_name(build);
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|e| StorageError::io("create the directory", &dir, e))?;
        Ok(StagedBuild::new(build, dir, self.dir(build)))
    }

    /// Removes a published build. It is gone for everyone at once; files that are open or mapped
    /// stay readable for those who hold them.
    ///
    /// Fails with [`StorageError::NotFound`] if it does not exist.
    pub async fn remove(&self, build: BuildId) -> Result<(), StorageError> {
        let store = self.clone();
        blocking("remove a build", move || {
            let from = store.dir(build);
            let doomed = store.staging_name(build);
            match fs::rename(&from, &doomed) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(StorageError::NotFound(build)),
                Err(e) => return Err(StorageError::io("unpublish", &from, e)),
            }
            store.sums.lock().remove(&build);
            fs::remove_dir_all(&doomed).map_err(|e| StorageError::io("remove", &doomed, e))
        })
        .await
    }

    /// Removes what killed processes left half written or half removed; returns how many
    /// directories that were.
    ///
    /// Nobody else may be staging: the daemon calls this at start while it holds its lock file.
    pub async fn reclaim(&self) -> Result<usize, StorageError> {
        let staging = self.root.join(STAGING);
        blocking("reclaim the staging directory", move || {
            let mut removed = 0;
            for entry in read_dir(&staging)? {
                let path = entry.path();
                let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
                let result = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                match result {
                    Ok(()) => removed += 1,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(StorageError::io("remove", &path, e)),
                }
            }
            if removed > 0 {
                warn!(removed, "removed builds that an earlier process left unfinished");
            }
            Ok(removed)
        })
        .await
    }

    fn staging_name(&self, build: BuildId) -> PathBuf {
        self.root.join(STAGING).join(format!("{build}-{}", Uuid::new_v4().simple()))
    }
}

fn is_there(path: &Path) -> Result<bool, StorageError> {
    path.try_exists().map_err(|e| StorageError::io("look for", path, e))
}

fn read_dir(dir: &Path) -> Result<Vec<fs::DirEntry>, StorageError> {
    fs::read_dir(dir).and_then(Iterator::collect).map_err(|e| StorageError::io("list", dir, e))
}
