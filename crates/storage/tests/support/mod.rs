//! What the tests of remote builds share: builds with known content, and a store that fails on
//! purpose.

#![allow(dead_code, reason = "each test uses its part")]

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use nidus_storage::{
    Artifact, BuildId, FrameCache, LocalStore,
    remote::{ReaderOptions, RemoteReader, RemoteStore, UploadOptions},
};
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio::runtime::Handle;

pub const FRAME: usize = 4096;

/// Frames and objects so small that a build has many.
pub const SMALL: UploadOptions =
    UploadOptions { frame_size: FRAME as u32, object_size: 3 * FRAME as u32, level: 1, parallel: 2 };

/// Bytes in runs of random ones, repeated ones and zeros.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let run = rng.random_range(1..3 * FRAME).min(len - bytes.len());
        match rng.random_range(0..3u8) {
            0 => bytes.resize(bytes.len() + run, 0),
            1 => bytes.resize(bytes.len() + run, rng.random()),
            _ => bytes.extend((0..run).map(|_| rng.random::<u8>())),
        }
    }
    bytes
}

/// A local store, and one build in it with these artifacts and a metadata.
pub struct Local {
    pub store: LocalStore,
    pub build: BuildId,
    pub dir: TempDir,
}

impl Local {
    pub async fn with(artifacts: &[(Artifact, Vec<u8>)]) -> Self {
        let dir = TempDir::new().unwrap();
        let store = LocalStore::open(dir.path().join("builds")).unwrap();
        let build = BuildId::random();
        let staged = store.stage(build).await.unwrap();
        staged.write(Artifact::Metadata, "{}").await.unwrap();
        for (artifact, bytes) in artifacts {
            staged.write(*artifact, bytes.clone()).await.unwrap();
        }
        staged.commit().await.unwrap();
        Self { store, build, dir }
    }

    /// A reader of `remote` with an empty cache.
    pub fn reader(&self, remote: &RemoteStore, name: &str, limit: u64) -> RemoteReader {
        let cache = FrameCache::open(self.dir.path().join(name), limit).unwrap();
        RemoteReader::new(remote.clone(), cache, ReaderOptions::default(), Handle::current())
    }

    /// Whether all of the build is in the remote store, byte for byte.
    pub async fn assert_whole(&self, remote: &RemoteStore) {
        let cache = TempDir::new_in(self.dir.path()).unwrap();
        let cache = FrameCache::open(cache.path(), 1 << 30).unwrap();
        let reader = RemoteReader::new(remote.clone(), cache, ReaderOptions::default(), Handle::current());
        let build = reader.open(self.build).await.unwrap();
        // The sums are of the local files: frames have their own.
        for artifact in Artifact::ALL.into_iter().filter(|a| *a != Artifact::Checksums) {
            let Ok(expected) = std::fs::read(self.store.path(self.build, artifact)) else {
                assert!(build.artifact(artifact).is_err());
                continue;
            };
            let source = build.artifact(artifact).unwrap();
            assert_eq!(source.size(), expected.len() as u64);
            let mut bytes = vec![1; expected.len()];
            source.read_at(0, &mut bytes).await.unwrap();
            assert!(bytes == expected, "{artifact} differs");
        }
    }
}

/// A store in memory that can be told to fail, to be slow and to damage what it returns.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<InMemory>,
    /// How many operations still succeed.
    budget: Arc<AtomicU64>,
    /// Whether the one that fails takes effect nevertheless, as when the answer is lost.
    effect: AtomicBool,
    /// How many answers are still to be damaged.
    pub damage: AtomicU64,
    /// What every operation takes.
    pub delay: Duration,
    pub puts: AtomicU64,
    pub gets: AtomicU64,
    pub at_once: AtomicU64,
    pub most_at_once: AtomicU64,
}

impl Faulty {
    pub fn new(delay: Duration) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::new(InMemory::new()),
            budget: Arc::new(u64::MAX.into()),
            effect: false.into(),
            damage: 0.into(),
            delay,
            puts: 0.into(),
            gets: 0.into(),
            at_once: 0.into(),
            most_at_once: 0.into(),
        })
    }

    pub fn remote(self: &Arc<Self>) -> RemoteStore {
        RemoteStore::over(self.clone(), "memory://test")
    }

    /// Everything fails after `operations` more; the first failure takes effect if `effect`.
    pub fn fail_after(&self, operations: u64, effect: bool) {
        self.effect.store(effect, SeqCst);
        self.budget.store(operations, SeqCst);
    }

    /// Whether the operation that begins now succeeds, and whether it takes effect.
    async fn begin(&self) -> (bool, bool) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        match spend(&self.budget) {
            false => (false, self.effect.swap(false, SeqCst)),
            true => (true, true),
        }
    }
}

/// Takes one operation off the budget; `false` if there is none left.
fn spend(budget: &AtomicU64) -> bool {
    let before = budget.fetch_update(SeqCst, SeqCst, |n| (n != u64::MAX).then(|| n.saturating_sub(1)));
    before != Ok(0)
}

fn fault() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "told to fail".into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (succeeds, takes_effect) = self.begin().await;
        if !takes_effect {
            return Err(fault());
        }
        self.puts.fetch_add(1, SeqCst);
        let result = self.inner.put_opts(path, payload, options).await;
        if succeeds { result } else { Err(fault()) }
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        panic!("objects are small enough for one request");
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let now = self.at_once.fetch_add(1, SeqCst) + 1;
        self.most_at_once.fetch_max(now, SeqCst);
        let (succeeds, _) = self.begin().await;
        self.at_once.fetch_sub(1, SeqCst);
        if !succeeds {
            return Err(fault());
        }
        let is_data = !options.head && path.as_ref().starts_with("data/");
        let mut result = self.inner.get_opts(path, options).await?;
        if is_data {
            self.gets.fetch_add(1, SeqCst);
            let damage = self.damage.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok();
            if damage && let GetResultPayload::Stream(stream) = result.payload {
                let flip = |b: Result<bytes::Bytes>| {
                    b.map(|b| {
                        let mut b = b.to_vec();
                        let middle = b.len() / 2;
                        b[middle] ^= 0x10;
                        b.into()
                    })
                };
                result.payload = GetResultPayload::Stream(stream.map(flip).boxed());
            }
        }
        Ok(result)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        // One after another, each of which may be the one that fails.
        let (inner, budget) = (self.inner.clone(), self.budget.clone());
        let delete = move |path: Result<Path>| {
            let (inner, budget) = (inner.clone(), budget.clone());
            async move {
                let path = path?;
                if !spend(&budget) {
                    return Err(fault());
                }
                inner.delete(&path).await.map(|()| path)
            }
        };
        paths.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match spend(&self.budget) {
            false => futures::stream::iter([Err(fault())]).boxed(),
            true => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
