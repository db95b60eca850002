//! Removing builds, and what dead uploads and removals left.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    time::{Duration, SystemTime},
};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectMeta, ObjectStoreExt, path::Path};
use tracing::{info, warn};

use super::{
    RemoteError, RemoteStore, data_path, inventory::owner_of, manifest_path, named, object_path, off_runtime,
    order_path,
};
use crate::{Artifact, BuildId, StorageError};

/// What a sweep may touch.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// Builds of which anything is younger than this are left alone: someone may be uploading them.
    /// More than the longest upload of one object and more than the difference between the clocks.
    pub older_than: Duration,
    /// Builds that are left alone, such as those in the [`super::UploadQueue`].
    pub keep: HashSet<BuildId>,
    /// Whether to say only what would be removed.
    pub dry_run: bool,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { older_than: Duration::from_secs(24 * 3600), keep: HashSet::new(), dry_run: true }
    }
}

/// Objects that no manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Whose they are.
    pub build: BuildId,
    /// Whether the build itself is in the store: only objects that it does not name are left over.
    pub published: bool,
    /// How many there are.
    pub objects: usize,
    /// How many bytes they have.
    pub bytes: u64,
}

impl RemoteStore {
    /// Removes a build: the manifest first, so that nobody sees it in part, then its objects.
    ///
    /// If this fails or its process dies after the first step, what is left is removed by the next
    /// call or by a sweep. Fails with [`RemoteError::NotFound`] if nothing of the build is there.
    pub async fn remove(&self, build: BuildId) -> Result<(), RemoteError> {
        let existed = self.exists(build).await?;
        if existed {
            self.delete(&manifest_path(build)).await?;
        }
        let objects = self.list_objects(data_path(build)).await?;
        if !existed && objects.is_empty() {
            return Err(RemoteError::NotFound(build));
        }
        self.delete_all(build, objects.into_iter().map(|o| o.location).collect()).await
    }

    /// Finds what uploads and removals that died left behind, and removes it unless this is a dry
    /// run.
    pub async fn sweep(&self, sweep: &Sweep) -> Result<Vec<Leftover>, RemoteError> {
        let mut of_build: BTreeMap<BuildId, Vec<ObjectMeta>> = BTreeMap::new();
        for object in self.list_objects(Path::from("data")).await? {
            let build = object.location.parts().nth(1).and_then(|p| named(p.as_ref()));
            if let Some(build) = build.filter(|b| !sweep.keep.contains(b)) {
                of_build.entry(build).or_default().push(object);
            }
        }
        // After the objects: what was published in between counts.
        let published: HashSet<BuildId> = self.list().await?.into_iter().collect();
        let mut found = Vec::new();
        for (build, mut objects) in of_build {
            if objects.iter().any(|o| !is_older(o, sweep.older_than)) {
                continue;
            }
            let is_published = published.contains(&build);
            if is_published {
                let named = match self.named_objects(build).await {
                    Ok(named) => named,
                    Err(error @ (RemoteError::Manifest { .. } | RemoteError::NotFound(_))) => {
                        warn!(%error, "a sweep leaves a build alone");
                        continue;
                    }
                    Err(e) => return Err(e),
                };
                objects.retain(|o| !named.contains(&o.location) && owner_of(&o.location).is_none());
            }
            if objects.is_empty() {
                continue;
            }
            let bytes = objects.iter().map(|o| o.size).sum();
            found.push(Leftover { build, published: is_published, objects: objects.len(), bytes });
            if !sweep.dry_run {
                self.delete_all(build, objects.into_iter().map(|o| o.location).collect()).await?;
                info!(%build, bytes, "removed objects that belong to no build");
            }
        }
        self.sweep_files(sweep).await?;
        Ok(found)
    }

    /// All objects that a published build may have.
    async fn named_objects(&self, build: BuildId) -> Result<HashSet<Path>, RemoteError> {
        let manifest = self.manifest(build).await?;
        let mut named: HashSet<Path> = Artifact::ALL.map(|a| order_path(build, a)).into();
        for (artifact, map) in manifest.artifacts() {
            named.extend(map.objects().iter().map(|o| object_path(build, artifact, &o.checksum)));
        }
        Ok(named)
    }

    pub(super) async fn delete(&self, path: &Path) -> Result<(), RemoteError> {
        match self.timed("remove", path.as_ref(), self.store.delete(path)).await {
            Err(e) if !e.is_absent() => Err(e),
            _ => Ok(()),
        }
    }

    async fn delete_all(&self, build: BuildId, paths: Vec<Path>) -> Result<(), RemoteError> {
        let delete = async {
            let mut results = self.store.delete_stream(stream::iter(paths.into_iter().map(Ok)).boxed());
            loop {
                match results.try_next().await {
                    Ok(None) => return Ok(()),
                    // Someone else removed it.
                    Ok(Some(_)) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
        };
        self.timed("remove the objects of", &build.to_string(), delete).await
    }

    /// A directory has what no object store has: files of writes that died, which no listing shows.
    async fn sweep_files(&self, sweep: &Sweep) -> Result<(), RemoteError> {
        let Some(root) = self.directory.clone().filter(|_| !sweep.dry_run) else { return Ok(()) };
        let older_than = sweep.older_than;
        let keep = sweep.keep.clone();
        let work = move || -> Result<(), StorageError> {
            for builds in list_dir(&root.join("data"))? {
                if builds.file_name().to_str().and_then(named).is_some_and(|b| !keep.contains(&b)) {
                    remove_unfinished(&builds.path(), older_than)?;
                }
            }
            remove_unfinished(&root.join("builds"), older_than)
        };
        Ok(off_runtime("sweep a directory", work).await??)
    }
}

fn is_older(object: &ObjectMeta, than: Duration) -> bool {
    SystemTime::now().duration_since(object.last_modified.into()).is_ok_and(|age| age >= than)
}

fn list_dir(dir: &std::path::Path) -> Result<Vec<fs::DirEntry>, StorageError> {
    match fs::read_dir(dir).and_then(Iterator::collect) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(|e| StorageError::io("list", dir, e)),
    }
}

/// Removes files that a local client was writing: their names end in `#` and a number.
fn remove_unfinished(dir: &std::path::Path, older_than: Duration) -> Result<(), StorageError> {
    for entry in list_dir(dir)? {
        let name = entry.file_name();
        let Some((_, number)) = name.to_str().and_then(|n| n.rsplit_once('#')) else { continue };
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|m| m.elapsed().ok());
        if number.parse::<u64>().is_ok() && age.is_some_and(|a| a >= older_than) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|e| StorageError::io("remove", &path, e))?;
        }
    }
    // Empty ones are left by uploads that died at their first object.
    let _ = fs::remove_dir(dir);
    Ok(())
}
