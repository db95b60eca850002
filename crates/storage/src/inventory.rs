//! What there is of all builds, here and in the object store, for those who look for what can go.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, SystemTime},
};

use crate::{
    BuildId, Builds, StorageError,
    error::blocking,
    remote::{Leftover, RemoteTask, Sweep},
};

/// A published build and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Which one.
    pub build: BuildId,
    /// What it takes on this node's disk, in bytes.
    pub disk: Option<u64>,
    /// How many bytes the object store has of it.
    pub remote: Option<u64>,
    /// When it was last written to, here or there.
    pub newest: SystemTime,
    /// Whether this installation made it: not if another one, or nobody knows who, uploaded it.
    pub ours: bool,
    /// Whether it is still to be uploaded.
    pub uploading: bool,
}

impl Builds {
    /// Whether there is an object store, which others may use as well.
    pub fn has_remote(&self) -> bool {
        self.remote_side().is_some()
    }

    /// All builds, in the order of their ids.
    pub async fn inventory(&self) -> Result<Vec<Stored>, StorageError> {
        let local = self.local().clone();
        let ids = local.list().await?;
        let here = blocking("measure the builds", move || {
            let usage = ids.into_iter().map(|b| Ok(local.usage(b)?.map(|usage| (b, usage))));
            usage.filter_map(Result::transpose).collect::<Result<BTreeMap<_, _>, _>>()
        });
        let here = here.await?;
        let (mut there, mut owner, mut uploads) = Default::default();
        if let Some((reader, uploader)) = self.remote_side() {
            there = reader.store().inventory().await?;
            owner = reader.store().owner();
            uploads = self.uploads().await?;
            there.retain(|b, _| !uploader.is_doomed(*b));
        }
        let builds: HashSet<BuildId> = here.keys().chain(there.keys()).copied().collect();
        let mut stored: Vec<Stored> = builds
            .into_iter()
            .filter_map(|build| {
                let (disk, remote) = (here.get(&build), there.get(&build));
                let owners = remote.map(|r| r.owners.as_slice()).unwrap_or_default();
                Some(Stored {
                    build,
                    disk: disk.map(|(bytes, _)| *bytes),
                    remote: remote.map(|r| r.bytes),
                    newest: disk.map(|(_, t)| *t).max(remote.map(|r| r.newest))?,
                    ours: match owners {
                        [] => disk.is_some(),
                        owners => owners.iter().all(|o| Some(*o) == owner),
                    },
                    uploading: uploads.contains(&build),
                })
            })
            .collect();
        stored.sort_unstable_by_key(|s| s.build);
        Ok(stored)
    }

    /// Finds objects in the object store that no build names and that are older than `grace`, and
    /// removes them unless this is a dry run.
    pub async fn sweep(&self, grace: Duration, dry_run: bool) -> Result<Vec<Leftover>, StorageError> {
        let Some((reader, _)) = self.remote_side() else { return Ok(Vec::new()) };
        let keep = self.uploads().await?;
        Ok(reader.store().sweep(&Sweep { older_than: grace, keep, dry_run }).await?)
    }

    /// Does the removals that are queued for the object store, where no task does so.
    pub async fn remove_queued(&self) -> Result<(), StorageError> {
        match self.remote_side() {
            Some((_, uploader)) => uploader.remove_queued().await,
            None => Ok(()),
        }
    }

    async fn uploads(&self) -> Result<HashSet<BuildId>, StorageError> {
        let Some((_, uploader)) = self.remote_side() else { return Ok(HashSet::new()) };
        let queued = uploader.pending().await?.into_iter().filter(|(_, task)| *task != RemoteTask::Remove);
        Ok(queued.map(|(build, _)| build).collect())
    }
}
