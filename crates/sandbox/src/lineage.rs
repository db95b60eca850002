//! Which builds read the files of which.

use std::collections::HashMap;
use std::sync::Arc;

use nidus_block::header::Header;
use nidus_storage::{Artifact, BuildId, Builds, StorageError};
use parking_lot::Mutex;

use crate::Factory;

/// Why a build was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Paused sandboxes could not be resumed without it.
    #[error("build {build} cannot be deleted: {} paused sandboxes need it, {user} among them", count)]
    InUse {
        /// The build.
        build: BuildId,
        /// One that reads it.
        user: BuildId,
        /// How many do.
        count: usize,
    },
    /// Running sandboxes could not be paused without it.
    #[error("build {build} cannot be deleted: {count} running sandboxes were made from it")]
    Running {
        /// The build.
        build: BuildId,
        /// How many run.
        count: usize,
    },
    /// The store.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// How many sandboxes run from each build.
#[derive(Debug, Default)]
pub(crate) struct Uses(Mutex<HashMap<BuildId, usize>>);

/// A sandbox's hold on the build that it runs from.
#[derive(Debug)]
pub(crate) struct Use {
    uses: Arc<Uses>,
    build: BuildId,
}

impl Uses {
    /// One more, until the result is dropped.
    pub fn begin(self: &Arc<Self>, build: BuildId) -> Use {
        *self.0.lock().entry(build).or_default() += 1;
        Use { uses: self.clone(), build }
    }

    fn count(&self, build: BuildId) -> usize {
        self.0.lock().get(&build).copied().unwrap_or_default()
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut uses = self.uses.0.lock();
        if let Some(count) = uses.get_mut(&self.build) {
            *count -= 1;
            if *count == 0 {
                uses.remove(&self.build);
            }
        }
    }
}

impl Factory {
    /// Removes a published build and its warm machines, unless other builds read its files or
    /// sandboxes run from it.
    pub async fn remove(&self, build: BuildId) -> Result<(), RemoveError> {
        let _alone = self.removals().write().await;
        let count = self.uses().count(build);
        if count > 0 {
            return Err(RemoveError::Running { build, count });
        }
        let users = builds_that_read(self.store(), build).await?;
        if let Some(user) = users.first() {
            return Err(RemoveError::InUse { build, user: *user, count: users.len() });
        }
        self.forget(build).await;
        Ok(self.store().remove(build).await?)
    }
}

/// The published builds, other than itself, whose headers name `build`: without its files they
/// could not be resumed.
async fn builds_that_read(store: &Builds, build: BuildId) -> Result<Vec<BuildId>, StorageError> {
    let mut readers = Vec::new();
    for other in store.list().await?.into_iter().filter(|b| *b != build) {
        for artifact in [Artifact::MemfileHeader, Artifact::RootfsHeader] {
            if reads(store, other, artifact, build).await? {
                readers.push(other);
                break;
            }
        }
    }
    Ok(readers)
}

async fn reads(
    store: &Builds,
    other: BuildId,
    header: Artifact,
    build: BuildId,
) -> Result<bool, StorageError> {
    let text = match store.read(other, header).await {
        Ok(text) => text,
        // One that cannot be read is of no use to its build either.
        Err(e) if e.is_damage() || matches!(e, StorageError::NotFound(_)) => return Ok(false),
        Err(e) => return Err(e),
    };
    // The base counts even if no byte of it is left: whatever is made from this build names it too.
    let header = Header::parse(&text);
    Ok(header.is_ok_and(|h| h.base() == build || h.mappings().iter().any(|m| m.build == build)))
}

#[cfg(test)]
mod tests {
    use nidus_block::header::Mapping;

    use super::*;

    #[test]
    fn a_build_is_in_use_until_the_last_sandbox_of_it_ends() {
        let uses = Arc::<Uses>::default();
        let [a, b] = [(); 2].map(|()| BuildId::random());
        let (first, second, other) = (uses.begin(a), uses.begin(a), uses.begin(b));
        assert_eq!((uses.count(a), uses.count(b)), (2, 1));
        drop(first);
        drop(other);
        assert_eq!((uses.count(a), uses.count(b)), (1, 0));
        drop(second);
        assert!(uses.0.lock().is_empty());
    }

    #[tokio::test]
    async fn a_build_is_needed_by_its_children() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Builds::open(dir.path()).unwrap();
        let [base, child, alone] = [(); 3].map(|()| BuildId::random());
        let identity = |b| Header::identity(b, 8192, 4096).unwrap();
        let stored = Mapping { offset: 0, len: 8192, build: child, build_offset: 0 };
        // Nothing of the base is left in it.
        let changed = identity(base).child(child, &[stored]).unwrap();
        for (build, header) in [(base, identity(base)), (child, changed), (alone, identity(alone))] {
            let staged = store.stage(build).await.unwrap();
            staged.write(Artifact::MemfileHeader, header.to_bytes()).await.unwrap();
            staged.write(Artifact::Metadata, "{}").await.unwrap();
            staged.commit().await.unwrap();
        }
        assert_eq!(builds_that_read(&store, base).await.unwrap(), [child]);
        assert!(builds_that_read(&store, child).await.unwrap().is_empty());
        assert!(builds_that_read(&store, alone).await.unwrap().is_empty());
    }
}
