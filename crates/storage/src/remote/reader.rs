//! Reading frames: from memory, from the disk cache, from the store, and each only once at a time.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{
    FutureExt, StreamExt, TryStreamExt,
    future::{BoxFuture, Shared},
    stream,
};
use object_store::ObjectStoreExt;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Semaphore};
use tracing::warn;

use super::{
    Frame, FrameError, FrameMap, Manifest, RemoteArtifact, RemoteError, RemoteStore, frame::decode, joined,
    object_path, off_runtime,
};
use crate::{
    Artifact, BuildId, BuildPin, FrameCache, StorageError,
    cache::{FrameKey, Lru},
};

/// The bounds of a [`RemoteReader`].
#[derive(Debug, Clone, Copy)]
pub struct ReaderOptions {
    /// How many frames are fetched at once because someone waits for them.
    pub parallel: usize,
    /// How many frames are fetched at once ahead of need, beside those.
    pub ahead: usize,
    /// How many bytes of decompressed frames are kept in memory.
    pub memory: u64,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self { parallel: 16, ahead: 16, memory: 32 << 20 }
    }
}

/// What a reader did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReaderStats {
    /// Frames fetched from the store.
    pub fetched: u64,
    /// The bytes that they have there.
    pub fetched_bytes: u64,
    /// Frames read from the disk cache.
    pub cached: u64,
    /// Frames whose content was not what was uploaded, in the cache or in the store.
    pub damaged: u64,
}

/// Why a frame is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Someone waits for it.
    Now,
    /// Someone may come to need it.
    Ahead,
}

/// The most bytes of manifests that are kept in memory for builds that are opened again.
const MANIFESTS: u64 = 16 << 20;

type Flight = Shared<BoxFuture<'static, Result<Bytes, RemoteError>>>;

/// Reads builds from an object store through a cache. Clones share everything.
#[derive(Debug, Clone)]
pub struct RemoteReader {
    shared: Arc<ReaderShared>,
}

#[derive(Debug)]
struct ReaderShared {
    store: RemoteStore,
    cache: FrameCache,
    runtime: Handle,
    memory: u64,
    hot: Mutex<Lru<FrameKey, Bytes>>,
    manifests: Mutex<Lru<BuildId, Arc<Manifest>>>,
    flights: Mutex<HashMap<FrameKey, Flight>>,
    now: Semaphore,
    ahead: Semaphore,
    ahead_width: usize,
    fetched: AtomicU64,
    fetched_bytes: AtomicU64,
    cached: AtomicU64,
    damaged: AtomicU64,
}

impl RemoteReader {
    /// A reader whose work runs on `runtime`.
    pub fn new(store: RemoteStore, cache: FrameCache, options: ReaderOptions, runtime: Handle) -> Self {
        let shared = ReaderShared {
            store,
            cache,
            runtime,
            memory: options.memory,
            hot: Mutex::new(Lru::new()),
            manifests: Mutex::new(Lru::new()),
            flights: Mutex::new(HashMap::new()),
            now: Semaphore::new(options.parallel.max(1)),
            ahead: Semaphore::new(options.ahead.max(1)),
            ahead_width: options.ahead.max(1),
            fetched: AtomicU64::new(0),
            fetched_bytes: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The store that it reads.
    pub fn store(&self) -> &RemoteStore {
        &self.shared.store
    }

    /// Its cache.
    pub fn cache(&self) -> &FrameCache {
        &self.shared.cache
    }

    /// What it did so far.
    pub fn stats(&self) -> ReaderStats {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        ReaderStats {
            fetched: read(&self.shared.fetched),
            fetched_bytes: read(&self.shared.fetched_bytes),
            cached: read(&self.shared.cached),
            damaged: read(&self.shared.damaged),
        }
    }

    /// Opens a build: fetches its manifest, unless it was open a while ago, and keeps its cached
    /// frames while the build is open.
    pub async fn open(&self, build: BuildId) -> Result<RemoteBuild, RemoteError> {
        let pin = Arc::new(self.shared.cache.pin(build));
        let known = self.shared.manifests.lock().get(&build).cloned();
        let manifest = match known {
            Some(manifest) => manifest,
            None => {
                let manifest = Arc::new(self.shared.store.manifest(build).await?);
                let mut manifests = self.shared.manifests.lock();
                manifests.insert(build, manifest.clone(), manifest.memory(), false);
                while manifests.used() > MANIFESTS && manifests.evict().is_some() {}
                manifest
            }
        };
        Ok(RemoteBuild { reader: self.clone(), manifest, pin })
    }

    /// Forgets all that is kept of a build, such as one that was deleted. Blocks on the disk.
    pub fn forget(&self, build: BuildId) {
        self.shared.manifests.lock().remove(&build);
        self.shared.hot.lock().remove_all(FrameKey::of(build));
        self.shared.cache.forget(build);
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.shared.runtime
    }

    pub(super) fn ahead_width(&self) -> usize {
        self.shared.ahead_width
    }

    /// The content of a frame if it is in memory.
    pub(super) fn hot(&self, key: &FrameKey) -> Option<Bytes> {
        self.shared.hot.lock().get(key).cloned()
    }

    /// The content of a frame. All who want it at once wait for one and the same fetch, which ends
    /// even if they all give up.
    pub(super) async fn frame(
        &self,
        map: &Arc<FrameMap>,
        key: FrameKey,
        need: Need,
    ) -> Result<Bytes, RemoteError> {
        if let Some(content) = self.hot(&key) {
            return Ok(content);
        }
        let flight = {
            let mut flights = self.shared.flights.lock();
            match flights.get(&key) {
                Some(flight) => flight.clone(),
                None => {
                    // One that landed just now is in memory before it leaves the list.
                    if let Some(content) = self.hot(&key) {
                        return Ok(content);
                    }
                    let (reader, map) = (self.clone(), map.clone());
                    let task = self.shared.runtime.spawn(async move {
                        let _landing = Landing { reader: &reader, key };
                        let content = reader.load(&map, key, need).await?;
                        reader.keep(key, &content);
                        Ok(content)
                    });
                    let flight = async move { joined("fetch a frame", task.await)? }.boxed().shared();
                    flights.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }

    /// Keeps a frame in memory, in place of those used longest ago.
    fn keep(&self, key: FrameKey, content: &Bytes) {
        let len = content.len() as u64;
        let mut hot = self.shared.hot.lock();
        hot.insert(key, content.clone(), len, false);
        // The newest stays even if it alone is too large: those who come late to its flight find it.
        while hot.used() > self.shared.memory.max(len) && hot.evict().is_some() {}
    }

    async fn load(&self, map: &FrameMap, key: FrameKey, need: Need) -> Result<Bytes, RemoteError> {
        let FrameKey { build, artifact, frame: number } = key;
        let len = map.content_len(number) as usize;
        let Some((frame, object)) = map.locate(number) else { return Ok(Bytes::from(vec![0; len])) };
        if let Some(content) = self.cached(key, frame, len).await? {
            return Ok(content);
        }
        let path = object_path(build, artifact, &object.checksum);
        let semaphore = if need == Need::Now { &self.shared.now } else { &self.shared.ahead };
        // Never closed.
        let _permit = semaphore.acquire().await;
        let first = self.fetch(key, frame, len, &path).await.inspect_err(|e| {
            // The build was removed, or stored in another way: its manifest is of no use any more.
            if e.is_absent() {
                self.shared.manifests.lock().remove(&build);
            }
        });
        match first? {
            Ok(content) => Ok(content),
            Err(first) => {
                warn!(%build, %artifact, frame = number, %first, "fetching a damaged frame once more");
                let second = self.fetch(key, frame, len, &path).await?;
                second.map_err(|source| RemoteError::Damaged { build, artifact, frame: number, source })
            }
        }
    }

    async fn cached(&self, key: FrameKey, frame: &Frame, len: usize) -> Result<Option<Bytes>, RemoteError> {
        if !self.shared.cache.contains(&key) {
            return Ok(None);
        }
        let (reader, checksum) = (self.clone(), frame.checksum);
        off_runtime("read a cached frame", move || {
            let shared = &reader.shared;
            match decode(&shared.cache.get(&key)?, len, checksum) {
                Ok(content) => {
                    shared.cached.fetch_add(1, Ordering::Relaxed);
                    Some(content.into())
                }
                Err(error) => {
                    let FrameKey { build, artifact, frame } = key;
                    warn!(%build, %artifact, frame, %error, "a cached frame is damaged");
                    shared.damaged.fetch_add(1, Ordering::Relaxed);
                    shared.cache.discard(&key);
                    None
                }
            }
        })
        .await
    }

    /// Fetches a frame once. The inner error says that it is damaged.
    async fn fetch(
        &self,
        key: FrameKey,
        frame: &Frame,
        len: usize,
        path: &object_store::path::Path,
    ) -> Result<Result<Bytes, FrameError>, RemoteError> {
        let range = u64::from(frame.offset)..u64::from(frame.offset) + u64::from(frame.len);
        let store = &self.shared.store;
        let stored = store.timed("read", path.as_ref(), store.store.get_range(path, range)).await?;
        self.shared.fetched.fetch_add(1, Ordering::Relaxed);
        self.shared.fetched_bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
        let (reader, checksum) = (self.clone(), frame.checksum);
        off_runtime("decompress a frame", move || {
            let content = decode(&stored, len, checksum);
            match &content {
                Ok(_) => drop(reader.shared.cache.put(&key, &stored)),
                Err(_) => drop(reader.shared.damaged.fetch_add(1, Ordering::Relaxed)),
            }
            content.map(Bytes::from)
        })
        .await
    }
}

/// Takes a flight off the list when it ends, however it does.
struct Landing<'a> {
    reader: &'a RemoteReader,
    key: FrameKey,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.reader.shared.flights.lock().remove(&self.key);
    }
}

/// An open build: its cached frames stay until it and all of its artifacts are dropped.
#[derive(Debug, Clone)]
pub struct RemoteBuild {
    reader: RemoteReader,
    manifest: Arc<Manifest>,
    pin: Arc<BuildPin>,
}

impl RemoteBuild {
    /// What the build consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// An artifact, to be read on demand. Fails with [`RemoteError::NoArtifact`] if there is none.
    pub fn artifact(&self, artifact: Artifact) -> Result<RemoteArtifact, RemoteError> {
        let build = self.manifest.build();
        let map = self.manifest.artifact(artifact).ok_or(RemoteError::NoArtifact { build, artifact })?;
        Ok(RemoteArtifact::new(self.reader.clone(), build, artifact, map.clone(), self.pin.clone()))
    }

    /// Writes all of an artifact to an empty file, with holes where it is zeros. It is not flushed to
    /// the disk. `path` is for messages.
    pub async fn copy_to(
        &self,
        artifact: Artifact,
        file: &Arc<File>,
        path: impl AsRef<Path>,
    ) -> Result<(), RemoteError> {
        let path = path.as_ref().to_owned();
        let source = self.artifact(artifact)?;
        let (size, frame_size) = (source.size(), u64::from(source.map().frame_size()));
        let numbers: Vec<u32> = source.map().frames().iter().map(|f| f.number).collect();
        file.set_len(size).map_err(|e| StorageError::io("write", &path, e))?;
        let width = self.reader.ahead_width();
        stream::iter(numbers)
            .map(|number| {
                let (source, file, path) = (source.clone(), file.clone(), path.clone());
                async move {
                    let content = source.frame(number, Need::Now).await?;
                    let offset = u64::from(number) * frame_size;
                    let write = move || file.write_all_at(&content, offset);
                    let written = off_runtime("write a file", write).await?;
                    written.map_err(|e| RemoteError::from(StorageError::io("write", path, e)))
                }
            })
            .buffer_unordered(width)
            .try_collect::<()>()
            .await
    }
}
