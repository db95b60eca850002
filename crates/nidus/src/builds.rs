//! Where builds are kept: this node's disk and, if one is configured, an object store behind it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nidus_api::Store;
use nidus_storage::remote::{
    ReaderOptions, RemoteOptions, RemoteQueue, RemoteReader, RemoteStore, UploadOptions, Uploader,
};
use nidus_storage::{Builds, FrameCache, LocalStore};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::config::Config;

/// How long an upload may go on after the daemon was told to stop. What is left is uploaded after
/// the next start.
const UPLOAD_GRACE: Duration = Duration::from_secs(10);

/// The node's builds and the task that uploads them, which ends in the middle if this is dropped.
pub struct NodeBuilds {
    pub builds: Arc<Builds>,
    stop: CancellationToken,
    uploads: AbortOnDropHandle<()>,
}

impl NodeBuilds {
    /// Opens what the configuration names. An object store that cannot be used is an error now, not
    /// when the first build is needed.
    pub async fn open(config: &Config) -> anyhow::Result<Self> {
        let store = crate::client::store(config).await?;
        let builds = open(config, &store).await?;
        store.close().await;
        if builds.reclaim().await? > 0 {
            tracing::warn!("removed builds that were never finished");
        }
        let stop = CancellationToken::new();
        let uploads = tokio::spawn({
            let (builds, stop) = (builds.clone(), stop.clone());
            async move { builds.upload(stop, UPLOAD_GRACE).await }
        });
        Ok(Self { builds: Arc::new(builds), stop, uploads: AbortOnDropHandle::new(uploads) })
    }

    /// Ends the uploads; the one under way gets some time.
    pub async fn release(self) {
        self.stop.cancel();
        if let Err(e) = self.uploads.await {
            tracing::error!("the uploads did not end well: {e}");
        }
    }
}

/// The builds that the configuration names. What is uploaded is marked as the installation's whose
/// `store` this is.
pub async fn open(config: &Config, store: &Store) -> anyhow::Result<Builds> {
    let dir = config.data_dir.clone();
    let local = on_disk(move || Ok(LocalStore::open(dir.join("storage"))?)).await?;
    match &config.storage {
        None => Ok(Builds::from(local)),
        Some(url) => with_remote(config, url, store.installation().await?, local).await,
    }
}

async fn with_remote(config: &Config, url: &str, owner: Uuid, local: LocalStore) -> anyhow::Result<Builds> {
    let options = RemoteOptions::default();
    let (dir, limit, url) = (config.data_dir.clone(), config.storage_cache_mb << 20, url.to_owned());
    let runtime = Handle::current();
    let (builds, store) = on_disk(move || {
        let store = RemoteStore::open(&url, &options)?.owned_by(owner);
        let cache = FrameCache::open(dir.join("cache"), limit)?;
        let queue = RemoteQueue::open(dir.join("uploads"))?;
        let uploader = Uploader::open(local.clone(), store.clone(), queue, UploadOptions::default())?;
        let reader = RemoteReader::new(store.clone(), cache, ReaderOptions::default(), runtime);
        Ok((Builds::with_remote(local, reader, uploader), store))
    })
    .await?;
    store.check().await?;
    tracing::info!("builds are kept in {}", store.name());
    Ok(builds)
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("The storage was not opened")?
}
