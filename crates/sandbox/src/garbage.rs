//! Garbage: builds that nothing refers to, and objects that no build names.
//!
//! Those above say what templates, sandboxes and snapshots refer to. What runs, what is still to be
//! uploaded, what others keep in the same object store, and what all of these read is found here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nidus_storage::{Artifact, BuildId, StorageError, Stored};
use nidus_template::TemplateMetadata;

use crate::lineage::Lineages;

/// Something that can go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// The build that it is, or was.
    pub build: BuildId,
    /// What it takes on this node's disk, in bytes.
    pub disk: u64,
    /// How many bytes the object store has of it.
    pub remote: u64,
    /// How long nobody has written to it, as far as is known.
    pub age: Option<Duration>,
    /// What it is, for people.
    pub why: String,
    /// Whether it is a build, rather than objects that none names.
    pub is_build: bool,
}

/// Why it is not known what is garbage.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    /// Without knowing what it reads, nothing can be said to be unneeded.
    #[error("it cannot be known what build {0} reads, and it is needed: repair or delete it first")]
    Unreadable(BuildId),
    /// The store.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl Lineages {
    /// The builds that neither `kept` nor anything that is known here refers to, directly or as what a
    /// needed build reads; each before those that it reads. Then what is left over in the object store.
    ///
    /// `kept` is what somebody had `at` this time: builds are noted before they are made, so what was
    /// made later is not garbage. In an object store, which others may use as well, nothing younger than
    /// `grace` is.
    pub async fn garbage(
        &self,
        kept: HashSet<BuildId>,
        at: SystemTime,
        grace: Duration,
    ) -> Result<Vec<Garbage>, GarbageError> {
        let stored = self.store().inventory().await?;
        let now = SystemTime::now();
        let age = |s: &Stored| now.duration_since(s.newest).unwrap_or_default();
        let shared = self.store().has_remote();
        let spared = |s: &&Stored| !s.ours || s.uploading || s.newest >= at || (shared && age(s) < grace);
        let mut needed = kept;
        needed.extend(self.uses.builds());
        needed.extend(stored.iter().filter(spared).map(|s| s.build));
        let reads = self.reads_of_all(stored.iter().map(|s| s.build).collect()).await?;
        let mut stored: HashMap<BuildId, Stored> = stored.into_iter().map(|s| (s.build, s)).collect();
        let mut garbage = Vec::new();
        for build in unreachable(&needed, &reads)? {
            let Some(s) = stored.remove(&build) else { continue };
            garbage.push(Garbage {
                build,
                disk: s.disk.unwrap_or_default(),
                remote: s.remote.unwrap_or_default(),
                age: Some(age(&s)),
                why: self.describe(build).await,
                is_build: true,
            });
        }
        for left in self.store().sweep(grace, true).await? {
            let what =
                if left.published { "its build has other ones" } else { "their build was never whole" };
            garbage.push(Garbage {
                build: left.build,
                disk: 0,
                remote: left.bytes,
                age: None,
                why: format!("{} objects left over: {what}", left.objects),
                is_build: false,
            });
        }
        Ok(garbage)
    }

    async fn describe(&self, build: BuildId) -> String {
        let text = self.store().read(build, Artifact::Metadata).await.ok();
        match text.and_then(|text| TemplateMetadata::parse(build, &text).ok()) {
            Some(m) if m.parent.is_some() => {
                format!("saved of a sandbox of template {}; nothing refers to it", m.template_id)
            }
            Some(m) => format!("a build of template {}; nothing refers to it", m.template_id),
            None => "nothing refers to it".to_owned(),
        }
    }
}

/// What each build reads; `None` where that cannot be known.
pub(crate) type Reads = HashMap<BuildId, Option<Arc<[BuildId]>>>;

/// Those of `reads` that are neither in `needed` nor read, at any remove, by one that is; readers come
/// before what they read.
fn unreachable(needed: &HashSet<BuildId>, reads: &Reads) -> Result<Vec<BuildId>, GarbageError> {
    let mut reached: HashSet<BuildId> = HashSet::new();
    let mut next: Vec<BuildId> = needed.iter().copied().collect();
    while let Some(build) = next.pop() {
        // What is needed and not there cannot be kept, and reads nothing.
        let Some(read) = reads.get(&build) else { continue };
        if reached.insert(build) {
            next.extend(read.as_deref().ok_or(GarbageError::Unreadable(build))?);
        }
    }
    let mut left: HashSet<BuildId> = reads.keys().copied().filter(|b| !reached.contains(b)).collect();
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let read: HashSet<BuildId> =
            left.iter().filter_map(|b| reads[b].as_deref()).flatten().copied().collect();
        let mut free: Vec<BuildId> = left.difference(&read).copied().collect();
        left.retain(|b| read.contains(b));
        if free.is_empty() {
            // Headers that name each other are no work of ours; whoever removes them finds them in use.
            free.extend(left.drain());
        }
        free.sort_unstable();
        ordered.extend(free);
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nidus_block::header::Header;
    use nidus_storage::Builds;
    use proptest::prelude::*;

    use super::*;
    use crate::lineage::tests::publish;

    /// Which builds a graph's `needed` reach, found by trying every edge until nothing changes.
    fn model(needed: &[bool], edges: &[(usize, usize)]) -> Vec<bool> {
        let mut reached = needed.to_vec();
        for _ in needed {
            for (reader, read) in edges {
                reached[*read] |= reached[*reader];
            }
        }
        reached
    }

    proptest! {
        /// Builds read older ones; some are needed, some read builds that are lost.
        #[test]
        fn what_nothing_reaches_goes_readers_first_and_nothing_else(
            needed in prop::collection::vec(any::<bool>(), 1..24),
            edges in prop::collection::vec((0..24usize, 0..24usize), 0..60),
            lost in prop::collection::vec(any::<bool>(), 24),
        ) {
            let count = needed.len();
            let ids: Vec<BuildId> = (0..count).map(|_| BuildId::random()).collect();
            let edges: Vec<_> =
                edges.into_iter().filter(|(a, b)| *a < count && b < a && !lost[*a]).collect();
            let reads: Reads = (0..count)
                .filter(|n| !lost[*n])
                .map(|n| {
                    let of_n = edges.iter().filter(|(a, _)| *a == n).map(|(_, b)| ids[*b]);
                    (ids[n], Some(of_n.collect()))
                })
                .collect();
            let roots = (0..count).filter(|n| needed[*n]).map(|n| ids[n]).collect();
            let found = unreachable(&roots, &reads).unwrap();
            let reached = model(&needed, &edges);
            let expected: HashSet<_> =
                (0..count).filter(|n| !reached[*n] && !lost[*n]).map(|n| ids[n]).collect();
            prop_assert_eq!(found.iter().copied().collect::<HashSet<_>>(), expected);
            let place = |n: usize| found.iter().position(|b| *b == ids[n]);
            for (reader, read) in &edges {
                if let (Some(reader), Some(read)) = (place(*reader), place(*read)) {
                    prop_assert!(reader < read);
                }
            }
        }
    }

    #[test]
    fn a_needed_build_that_cannot_be_read_stops_it_and_another_does_not() {
        let [needed, below, broken] = [(); 3].map(|()| BuildId::random());
        let reads: Reads = [(needed, Some([below].into())), (below, Some([].into())), (broken, None)].into();
        let roots = |b: BuildId| HashSet::from([b]);
        assert_eq!(unreachable(&roots(needed), &reads).unwrap(), [broken]);
        assert!(
            matches!(unreachable(&roots(broken), &reads), Err(GarbageError::Unreadable(b)) if b == broken)
        );
    }

    #[tokio::test]
    async fn what_is_kept_runs_or_is_new_is_no_garbage() {
        let dir = tempfile::TempDir::new().unwrap();
        let store = Arc::new(Builds::open(dir.path()).unwrap());
        let [base, kept, running, orphan, new] = [(); 5].map(|()| BuildId::random());
        let header = Header::identity(base, 8192, 4096).unwrap();
        publish(&store, &header).await;
        for build in [kept, running, orphan, new] {
            publish(&store, &header.child(build, &[]).unwrap()).await;
        }
        let at = SystemTime::now();
        let metadata = File::open(store.local().path(new, Artifact::Metadata)).unwrap();
        metadata.set_modified(at + Duration::from_secs(1)).unwrap();
        let lineages = Lineages::new(store.clone());
        let _use = lineages.uses.begin(running);
        let day = Duration::from_secs(86_400);
        let found = lineages.garbage([kept].into(), at, day).await.unwrap();
        assert_eq!(found.iter().map(|g| g.build).collect::<Vec<_>>(), [orphan]);
        assert!(found[0].is_build && found[0].disk > 0 && found[0].remote == 0 && found[0].age.is_some());
        // With nobody left, the base goes too, after its readers.
        let later = at + 2 * day;
        drop(_use);
        let found = lineages.garbage(HashSet::new(), later, day).await.unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!(found[4].build, base);
        for one in found {
            lineages.remove(one.build).await.unwrap();
        }
    }
}
