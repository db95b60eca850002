//! The task that does what the queue says, for as long as its process lives.

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{RemoteError, RemoteQueue, RemoteStore, RemoteTask, UploadOptions};
use crate::{BuildId, LocalStore, StorageError, error::blocking};

/// The wait after a first failure; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Brings builds into an object store, and takes them out again, in the background. Clones share the
/// queue; one of them runs it.
#[derive(Debug, Clone)]
pub struct Uploader {
    local: LocalStore,
    remote: RemoteStore,
    queue: RemoteQueue,
    options: UploadOptions,
    added: Arc<Notify>,
    /// Builds that are to be removed, and so are no longer to be found.
    doomed: Arc<Mutex<HashSet<BuildId>>>,
}

impl Uploader {
    /// An uploader of builds in `local`. Blocks for a few system calls.
    pub fn open(
        local: LocalStore,
        remote: RemoteStore,
        queue: RemoteQueue,
        options: UploadOptions,
    ) -> Result<Self, StorageError> {
        let tasks = queue.list()?;
        let doomed =
            tasks.into_iter().filter(|(_, task)| *task == RemoteTask::Remove).map(|(build, _)| build);
        let doomed = Arc::new(Mutex::new(doomed.collect()));
        Ok(Self { local, remote, queue, options, added: Arc::new(Notify::new()), doomed })
    }

    /// Queues a task. It will be done, if not by this process then by a later one.
    pub async fn add(&self, build: BuildId, task: RemoteTask) -> Result<(), StorageError> {
        let uploader = self.clone();
        blocking("queue a build", move || uploader.add_blocking(build, task)).await
    }

    /// The same on this thread, which waits for the disk.
    pub(crate) fn add_blocking(&self, build: BuildId, task: RemoteTask) -> Result<(), StorageError> {
        self.queue.add(build, task)?;
        match task {
            RemoteTask::Remove => self.doomed.lock().insert(build),
            RemoteTask::Upload | RemoteTask::Again => self.doomed.lock().remove(&build),
        };
        self.added.notify_one();
        Ok(())
    }

    /// Whether the build is to be removed, and is there only because that takes its time.
    pub fn is_doomed(&self, build: BuildId) -> bool {
        self.doomed.lock().contains(&build)
    }

    /// What is still to be done, in its order.
    pub async fn pending(&self) -> Result<Vec<(BuildId, RemoteTask)>, StorageError> {
        let queue = self.queue.clone();
        blocking("list the queue", move || queue.list()).await
    }

    async fn done(&self, build: BuildId, task: RemoteTask) -> Result<(), StorageError> {
        let queue = self.queue.clone();
        blocking("take a build off the queue", move || queue.done(build, task)).await?;
        if task == RemoteTask::Remove {
            self.doomed.lock().remove(&build);
        }
        Ok(())
    }

    /// Queues what is here and not in the object store: builds that a process published just before
    /// it was killed, and those that were made before there was an object store. Returns how many.
    pub async fn add_missing(&self) -> Result<usize, StorageError> {
        let there = self.remote.list().await?;
        let mut missing = self.local.list_by_age().await?;
        missing.retain(|b| there.binary_search(b).is_err());
        for build in &missing {
            self.add(*build, RemoteTask::Upload).await?;
        }
        Ok(missing.len())
    }

    /// Does what is queued, in its order, until `stop`; the task at hand then has `grace` to end, and
    /// what is left is for the next process. What fails is done again later, however often that takes.
    pub async fn run(&self, stop: CancellationToken, grace: Duration) {
        let mut wait = FIRST_WAIT;
        while !stop.is_cancelled() {
            let round = self.round(&stop);
            tokio::pin!(round);
            let done = tokio::select! {
                done = &mut round => Some(done),
                () = stop.cancelled() => tokio::time::timeout(grace, &mut round).await.ok(),
            };
            match done {
                Some(Ok(())) => {
                    wait = FIRST_WAIT;
                    tokio::select! {
                        () = self.added.notified() => {}
                        () = stop.cancelled() => {}
                    }
                }
                Some(Err(error)) => {
                    warn!(%error, again_in = ?wait, "cannot do what is queued for the object store");
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = stop.cancelled() => {}
                    }
                    wait = (2 * wait).min(LONGEST_WAIT);
                }
                None => {}
            }
        }
    }

    /// Does what is queued once. What fails on this side stands in no other's way; a store that
    /// fails ends the round.
    async fn round(&self, stop: &CancellationToken) -> Result<(), StorageError> {
        let mut failed = Ok(());
        for (build, task) in self.pending().await? {
            if stop.is_cancelled() {
                break;
            }
            match self.perform(build, task).await {
                Ok(()) => self.done(build, task).await?,
                // Waiting repairs nothing. The next start tries once more.
                Err(RemoteError::Local(error)) if error.is_damage() => {
                    warn!(%build, %error, "a build is not uploaded");
                    self.done(build, task).await?;
                }
                Err(RemoteError::Local(e)) => failed = Err(RemoteError::Local(e).into()),
                Err(e) => return Err(e.into()),
            }
        }
        failed
    }

    /// Does the removals that are queued, for a process that does not [`Uploader::run`] it.
    pub async fn remove_queued(&self) -> Result<(), StorageError> {
        for (build, task) in self.pending().await?.into_iter().filter(|(_, t)| *t == RemoteTask::Remove) {
            self.perform(build, task).await?;
            self.done(build, task).await?;
        }
        Ok(())
    }

    async fn perform(&self, build: BuildId, task: RemoteTask) -> Result<(), RemoteError> {
        let uploaded = match task {
            RemoteTask::Upload => self.remote.upload(&self.local, build, self.options).await,
            RemoteTask::Again => self.remote.upload_again(&self.local, build, self.options).await,
            RemoteTask::Remove => {
                return match self.remote.remove(build).await {
                    Err(RemoteError::NotFound(_)) => Ok(()),
                    result => result,
                };
            }
        };
        match uploaded {
            // It was removed before its turn came.
            Err(RemoteError::Local(e)) if matches!(*e, StorageError::NotFound(_)) => Ok(()),
            result => result.map(drop),
        }
    }
}
