//! Which builds read the files of which, and the removal of those that nobody needs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use nidus_block::header::Header;
use nidus_storage::{Artifact, BuildId, Builds, StorageError};
use parking_lot::Mutex;
use tokio::sync::{RwLock, RwLockWriteGuard};

use crate::Factory;
use crate::garbage::Reads;

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

/// A hold on a build, such as a sandbox's on the one that it runs from: it is not removed before this is dropped.
#[derive(Debug)]
pub struct Use {
    uses: Arc<Uses>,
    build: BuildId,
}

impl Uses {
    /// One more, until the result is dropped.
    pub fn begin(self: &Arc<Self>, build: BuildId) -> Use {
        *self.0.lock().entry(build).or_default() += 1;
        Use { uses: self.clone(), build }
    }

    pub fn count(&self, build: BuildId) -> usize {
        self.0.lock().get(&build).copied().unwrap_or_default()
    }

    /// The builds that sandboxes run from.
    pub fn builds(&self) -> Vec<BuildId> {
        self.0.lock().keys().copied().collect()
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

/// The builds of a node, and what they read of each other.
#[derive(Debug)]
pub struct Lineages {
    store: Arc<Builds>,
    /// What runs from them.
    pub(crate) uses: Arc<Uses>,
    /// Held shared while a build that reads others is published or a sandbox begins to use one,
    /// exclusively while one is removed or replaced.
    pub(crate) removals: RwLock<()>,
    /// What each build reads. A header never changes but by compaction, after which it names fewer.
    reads: Mutex<HashMap<BuildId, Arc<[BuildId]>>>,
}

/// A build that nobody needs, as long as this is held.
pub(crate) struct Unneeded<'a> {
    lineages: &'a Lineages,
    build: BuildId,
    _alone: RwLockWriteGuard<'a, ()>,
}

impl Unneeded<'_> {
    pub async fn remove(self) -> Result<(), RemoveError> {
        self.lineages.store.remove(self.build).await?;
        self.lineages.changed(self.build);
        Ok(())
    }
}

impl Lineages {
    /// The builds in `store`, of which nothing runs.
    pub fn new(store: Arc<Builds>) -> Self {
        Self { store, uses: Arc::default(), removals: RwLock::default(), reads: Mutex::default() }
    }

    /// Where the builds are.
    pub fn store(&self) -> &Arc<Builds> {
        &self.store
    }

    /// Keeps a build from being removed until the result is dropped; none if it is not there.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub async fn hold(&self, build: BuildId) -> Result<Option<Use>, StorageError> {
        let held = {
            let _no_removal = self.removals.read().await;
            self.uses.begin(build)
        };
        Ok(self.store.exists(build).await?.then_some(held))
    }

    /// Removes a build, unless other builds read its files or sandboxes run from it.
    pub async fn remove(&self, build: BuildId) -> Result<(), RemoveError> {
        self.unneeded(build).await?.remove().await
    }

    /// Makes sure that nothing needs a build, and that nothing will.
    pub(crate) async fn unneeded(&self, build: BuildId) -> Result<Unneeded<'_>, RemoveError> {
        let alone = self.removals.write().await;
        let count = self.uses.count(build);
        if count > 0 {
            return Err(RemoveError::Running { build, count });
        }
        let all = self.reads_of_all(self.store.list().await?).await?;
        // One that cannot be read is of no use to its build either.
        let reads_it = |reads: &Option<Arc<[BuildId]>>| reads.as_ref().is_some_and(|r| r.contains(&build));
        let readers = || all.iter().filter(|(_, reads)| reads_it(reads)).map(|(reader, _)| *reader);
        match readers().min() {
            Some(user) => Err(RemoveError::InUse { build, user, count: readers().count() }),
            None => Ok(Unneeded { lineages: self, build, _alone: alone }),
        }
    }

    /// What a build reads is to be found out again.
    pub(crate) fn changed(&self, build: BuildId) {
        self.reads.lock().remove(&build);
    }

    /// What each of `builds` reads, itself left out. Each header is read once in a process's life.
    pub(crate) async fn reads_of_all(&self, builds: Vec<BuildId>) -> Result<Reads, StorageError> {
        let mut all = HashMap::new();
        for build in builds {
            let known = self.reads.lock().get(&build).cloned();
            let reads = match known {
                Some(reads) => Some(reads),
                None => reads_of(&self.store, build).await?,
            };
            if let Some(reads) = &reads {
                self.reads.lock().insert(build, reads.clone());
            }
            all.insert(build, reads);
        }
        self.reads.lock().retain(|b, _| all.contains_key(b));
        Ok(all)
    }
}

impl Factory {
    /// Removes a published build and its warm machines, unless other builds read its files or
    /// sandboxes run from it.
    pub async fn remove(&self, build: BuildId) -> Result<(), RemoveError> {
        let unneeded = self.lineages().unneeded(build).await?;
        self.forget(build).await;
        unneeded.remove().await
    }
}

/// The builds, other than itself, that a build's headers name: without their files it could not be
/// resumed. `None` if the headers cannot be read.
async fn reads_of(store: &Builds, build: BuildId) -> Result<Option<Arc<[BuildId]>>, StorageError> {
    let mut reads = HashSet::new();
    for artifact in [Artifact::MemfileHeader, Artifact::RootfsHeader] {
        let text = match store.read(build, artifact).await {
            Ok(text) => text,
            Err(e) if e.lacks_artifact() => continue,
            Err(e) if e.is_damage() || matches!(e, StorageError::NotFound(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let Ok(header) = Header::parse(&text) else { return Ok(None) };
        reads.extend(header.mappings().iter().map(|m| m.build));
        // The base counts even if no byte of it is left: whatever is made from this build names it too.
        reads.insert(header.base());
    }
    reads.retain(|b| *b != build && !b.is_nil());
    Ok(Some(reads.into_iter().collect()))
}

#[cfg(test)]
pub(crate) mod tests {
    use nidus_block::header::Mapping;

    use super::*;

    /// Publishes a build with these headers of its memory.
    pub(crate) async fn publish(store: &Builds, header: &Header) {
        let staged = store.stage(header.build()).await.unwrap();
        staged.write(Artifact::MemfileHeader, header.to_bytes()).await.unwrap();
        staged.write(Artifact::Metadata, "{}").await.unwrap();
        staged.commit().await.unwrap();
    }

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
    async fn a_build_is_needed_by_its_children_and_by_what_runs_from_it() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Arc::new(Builds::open(dir.path()).unwrap());
        let [base, child, alone] = [(); 3].map(|()| BuildId::random());
        let identity = |b| Header::identity(b, 8192, 4096).unwrap();
        let stored = Mapping { offset: 0, len: 8192, build: child, build_offset: 0 };
        // Nothing of the base is left in it.
        let changed = identity(base).child(child, &[stored]).unwrap();
        for header in [identity(base), changed, identity(alone)] {
            publish(&store, &header).await;
        }
        let lineages = Lineages::new(store.clone());
        let running = lineages.uses.begin(alone);
        assert!(matches!(lineages.remove(alone).await, Err(RemoveError::Running { count: 1, .. })));
        drop(running);
        let used = lineages.remove(base).await;
        assert!(matches!(used, Err(RemoveError::InUse { user, count: 1, .. }) if user == child), "{used:?}");
        for build in [child, base, alone] {
            lineages.remove(build).await.unwrap();
        }
        assert!(store.list().await.unwrap().is_empty() && lineages.reads.lock().is_empty());
    }

    #[tokio::test]
    async fn a_header_is_read_once() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Arc::new(Builds::open(dir.path()).unwrap());
        let [base, child] = [(); 2].map(|()| BuildId::random());
        let header = Header::identity(base, 8192, 4096).unwrap();
        publish(&store, &header).await;
        publish(&store, &header.child(child, &[]).unwrap()).await;
        let lineages = Lineages::new(store.clone());
        let all = lineages.reads_of_all(vec![base, child]).await.unwrap();
        assert_eq!(all[&base].as_deref(), Some(&[][..]));
        assert_eq!(all[&child].as_deref(), Some(&[base][..]));
        std::fs::remove_file(store.local().path(child, Artifact::MemfileHeader)).unwrap();
        assert_eq!(lineages.reads_of_all(vec![base, child]).await.unwrap(), all);
        lineages.changed(child);
        assert_eq!(lineages.reads_of_all(vec![base, child]).await.unwrap()[&child], None, "it is lost");
    }
}
