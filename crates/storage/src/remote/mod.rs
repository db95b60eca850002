//! Builds in an object store: a directory, S3 or GCS.
//!
//! ```text
//! builds/{build id}                          the manifest, written last
//! data/{build id}/{artifact}.{checksum}      frames, one after another
//! data/{build id}/{artifact}.order           the recorded order of their first use, if there is one
//! data/{build id}/upload                     an upload is under way, or died
//! data/{build id}/owner.{uuid}               who uploaded it
//! ```
//!
//! A build exists when its manifest does. Objects are named by their checksum and never changed, so
//! an upload that died is resumed by leaving out what is there, and whatever no manifest names is a
//! leftover, of an upload or of a removal, which [`RemoteStore::sweep`] finds.

mod artifact;
mod connect;
mod error;
mod frame;
mod inventory;
mod manifest;
mod order;
mod pack;
mod queue;
mod reader;
mod remove;
mod upload;
mod uploader;

use std::{fmt, future::Future, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, path::Path};
use tokio::task::JoinError;
use uuid::Uuid;

pub use artifact::{ReadAhead, RemoteArtifact};
pub use connect::RemoteOptions;
pub use error::RemoteError;
pub use frame::{Checksum, FrameError, is_zero};
pub use inventory::Held;
pub use manifest::{Frame, FrameMap, Manifest, ManifestError, Object};
pub use order::{AccessOrder, OrderError};
pub use queue::{RemoteQueue, RemoteTask};
pub use reader::{ReaderOptions, ReaderStats, RemoteBuild, RemoteReader};
pub use remove::{Leftover, Sweep};
pub use upload::{UploadOptions, Uploaded};
pub use uploader::Uploader;

use crate::{Artifact, BuildId};

/// How long one operation may take, retries included.
const OPERATION_LIMIT: Duration = Duration::from_secs(120);

/// Builds in an object store. Clones share the client and its connections.
#[derive(Clone)]
pub struct RemoteStore {
    store: Arc<dyn ObjectStore>,
    name: Arc<str>,
    /// Where the objects are files, for what only a file system has.
    directory: Option<Arc<PathBuf>>,
    /// As whose uploads are marked.
    owner: Option<Uuid>,
}

impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteStore").field(&self.name).finish()
    }
}

impl RemoteStore {
    /// The store of a URL: `file:///directory`, `s3://bucket/prefix`, `gs://bucket/prefix`.
    ///
    /// Makes the directory of a `file:` URL. Makes no request: see [`RemoteStore::check`].
    pub fn open(url: &str, options: &RemoteOptions) -> Result<Self, RemoteError> {
        let connected = connect::connect(url, options)?;
        Ok(Self {
            store: connected.store,
            name: connected.name.into(),
            directory: connected.directory.map(Arc::new),
            owner: None,
        })
    }

    /// The store over any client; `name` is for messages.
    pub fn over(store: Arc<dyn ObjectStore>, name: &str) -> Self {
        Self { store, name: name.into(), directory: None, owner: None }
    }

    /// Its URL, without anything secret.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the store can be reached and lets us list: what is wrong is said by the error.
    pub async fn check(&self) -> Result<(), RemoteError> {
        let list = async { self.store.list(Some(&Path::from("builds"))).next().await.transpose() };
        self.timed("list", "builds", list).await.map(drop)
    }

    /// The builds that are in the store, in the order of their ids.
    pub async fn list(&self) -> Result<Vec<BuildId>, RemoteError> {
        let objects = self.list_objects(Path::from("builds")).await?;
        let mut builds: Vec<_> = objects.iter().filter_map(|o| named(o.location.filename()?)).collect();
        builds.sort_unstable();
        Ok(builds)
    }

    /// Whether the build is in the store, whole.
    pub async fn exists(&self, build: BuildId) -> Result<bool, RemoteError> {
        let path = manifest_path(build);
        match self.timed("look for", path.as_ref(), self.store.head(&path)).await {
            Ok(_) => Ok(true),
            Err(e) if e.is_absent() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// What a build consists of.
    ///
    /// Fails with [`RemoteError::NotFound`] if it is not in the store, with
    /// [`RemoteError::Manifest`] if its manifest is damaged.
    pub async fn manifest(&self, build: BuildId) -> Result<Manifest, RemoteError> {
        let path = manifest_path(build);
        let too_long = || RemoteError::Manifest { build, source: ManifestError::Length };
        let bytes = match self.get_bounded("read", &path, manifest::MAX_MANIFEST).await {
            Ok(bytes) => bytes.ok_or_else(too_long)?,
            Err(e) if e.is_absent() => return Err(RemoteError::NotFound(build)),
            Err(e) => return Err(e),
        };
        let parse = move || {
            let manifest = Manifest::parse(&bytes)?;
            match manifest.build() {
                b if b == build => Ok(manifest),
                other => Err(ManifestError::Build(other)),
            }
        };
        let parsed = off_runtime("read a manifest", parse).await?;
        parsed.map_err(|source| RemoteError::Manifest { build, source })
    }

    /// Stores the order in which an artifact's frames were first used, in place of an earlier one.
    pub async fn put_order(
        &self,
        build: BuildId,
        artifact: Artifact,
        order: &AccessOrder,
    ) -> Result<(), RemoteError> {
        self.put(&order_path(build, artifact), order.to_bytes().into()).await
    }

    /// The recorded order of an artifact; `None` if nobody stored one.
    pub async fn order(
        &self,
        build: BuildId,
        artifact: Artifact,
    ) -> Result<Option<AccessOrder>, RemoteError> {
        let bad = |source| RemoteError::Order { build, artifact, source };
        match self.get_bounded("read", &order_path(build, artifact), AccessOrder::MAX_BYTES).await {
            Ok(Some(bytes)) => AccessOrder::parse(&bytes).map(Some).map_err(bad),
            Ok(None) => Err(bad(OrderError::Format)),
            Err(e) if e.is_absent() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The bytes of an object; `None` if it has more than `max`.
    async fn get_bounded(
        &self,
        action: &'static str,
        path: &Path,
        max: usize,
    ) -> Result<Option<Bytes>, RemoteError> {
        self.timed(action, path.as_ref(), async {
            let result = self.store.get_opts(path, GetOptions::new()).await?;
            if result.meta.size > max as u64 {
                return Ok(None);
            }
            result.bytes().await.map(Some)
        })
        .await
    }

    async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), RemoteError> {
        self.timed("write", path.as_ref(), self.store.put(path, bytes.into())).await.map(drop)
    }

    async fn list_objects(&self, prefix: Path) -> Result<Vec<ObjectMeta>, RemoteError> {
        let list = async { self.store.list(Some(&prefix)).try_collect().await };
        self.timed("list", prefix.as_ref(), list).await
    }

    /// Runs an operation within the time limit, and says what failed.
    async fn timed<T>(
        &self,
        action: &'static str,
        object: &str,
        operation: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, RemoteError> {
        match tokio::time::timeout(OPERATION_LIMIT, operation).await {
            Ok(result) => result.map_err(|e| RemoteError::client(&self.name, action, object.to_owned(), e)),
            Err(_) => Err(RemoteError::TimedOut {
                store: self.name.clone(),
                action,
                object: object.to_owned(),
                limit: OPERATION_LIMIT,
            }),
        }
    }
}

fn manifest_path(build: BuildId) -> Path {
    Path::from(format!("builds/{build}"))
}

fn data_path(build: BuildId) -> Path {
    Path::from(format!("data/{build}"))
}

fn object_path(build: BuildId, artifact: Artifact, checksum: &Checksum) -> Path {
    Path::from(format!("data/{build}/{artifact}.{checksum}"))
}

fn order_path(build: BuildId, artifact: Artifact) -> Path {
    Path::from(format!("data/{build}/{artifact}.order"))
}

/// The build whose name this is, in the one form that we write.
fn named(name: &str) -> Option<BuildId> {
    name.parse::<BuildId>().ok().filter(|b| b.to_string() == name)
}

/// Runs `work`, which computes or blocks on the disk, away from the runtime's own threads.
async fn off_runtime<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RemoteError> {
    joined(action, tokio::task::spawn_blocking(work).await)
}

/// What a task returned; a panic in it goes on in the caller.
fn joined<T>(action: &'static str, result: Result<T, JoinError>) -> Result<T, RemoteError> {
    match result {
        Ok(result) => Ok(result),
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(RemoteError::Shutdown { action }),
        },
    }
}
