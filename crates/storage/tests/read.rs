//! Reads of builds in an object store: the right bytes or an error, each frame fetched once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use nidus_storage::{
    Artifact, FrameCache,
    remote::{AccessOrder, ReaderOptions, RemoteArtifact, RemoteError, RemoteReader, UploadOptions},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use proptest::prelude::*;
use support::{FRAME, Faulty, Local, SMALL, content};
use tokio::runtime::{Builder, Handle};

/// Frames of a memfile of which none is zeros.
fn full(frames: usize) -> Vec<u8> {
    (0..frames * FRAME).map(|n| (n / FRAME + n % 251 + 1) as u8 | 1).collect()
}

struct Remote {
    local: Local,
    store: Arc<Faulty>,
    bytes: Vec<u8>,
}

impl Remote {
    async fn new(bytes: Vec<u8>, delay: Duration, options: UploadOptions) -> Self {
        let local = Local::with(&[(Artifact::Memfile, bytes.clone())]).await;
        let store = Faulty::new(delay);
        store.remote().upload(&local.store, local.build, options).await.unwrap();
        Self { local, store, bytes }
    }

    async fn open(&self, reader: &RemoteReader) -> RemoteArtifact {
        reader.open(self.local.build).await.unwrap().artifact(Artifact::Memfile).unwrap()
    }

    fn reader(&self) -> RemoteReader {
        self.local.reader(&self.store.remote(), "cache", 1 << 30)
    }

    async fn check(&self, source: &RemoteArtifact, offset: usize, len: usize) {
        let mut buf = vec![0xee; len];
        source.read_at(offset as u64, &mut buf).await.unwrap();
        assert!(buf == self.bytes[offset..offset + len], "{len} at {offset}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever the content, the cut, the cache and the kind of read: the bytes are the file's.
    #[test]
    fn any_read_is_what_the_file_has(
        seed in any::<u64>(),
        len in 0..150_000usize,
        frame_bits in 12..17u32,
        object_size in 1..100_000u32,
        limit in prop::sample::select(vec![0u64, 40_000, 1 << 30]),
        memory in prop::sample::select(vec![0u64, 50_000, 1 << 20]),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0..60_000usize, 0..3u8), 1..12),
    ) {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let options = UploadOptions { frame_size: 1 << frame_bits, object_size, level: 1, parallel: 3 };
            let remote = Remote::new(content(seed, len), Duration::ZERO, options).await;
            let cache = FrameCache::open(remote.local.dir.path().join("cache"), limit).unwrap();
            let bounds = ReaderOptions { parallel: 2, ahead: 2, memory };
            let reader = RemoteReader::new(remote.store.remote(), cache, bounds, Handle::current());
            let source = remote.open(&reader).await;
            assert_eq!(source.size(), len as u64);
            for (at, count, kind) in reads {
                let offset = at.index(len + 1);
                let count = count.min(len - offset);
                let expected = remote.bytes[offset..offset + count].to_vec();
                let mut buf = vec![0xee; count];
                match kind {
                    0 => source.read_at(offset as u64, &mut buf).await.unwrap(),
                    1 => {
                        let source = source.clone();
                        let read = move || source.read_blocking(offset as u64, &mut buf).map(|()| buf);
                        buf = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
                    }
                    _ => {
                        if !source.try_read_at(offset as u64, &mut buf).unwrap() {
                            continue;
                        }
                    }
                }
                assert!(buf == expected, "{count} at {offset}");
            }
            let path = remote.local.dir.path().join("whole");
            let build = reader.open(remote.local.build).await.unwrap();
            let file = Arc::new(fs::File::create_new(&path).unwrap());
            build.copy_to(Artifact::Memfile, &file, &path).await.unwrap();
            assert!(fs::read(&path).unwrap() == remote.bytes);
            assert!(reader.cache().used() <= limit);
            let past = source.read_at(len as u64, &mut [0]).await.unwrap_err();
            assert!(matches!(past, RemoteError::OutOfRange { .. }));
            assert!(source.read_at(u64::MAX, &mut [0]).await.is_err());
        });
    }
}

#[tokio::test]
async fn readers_at_once_share_one_fetch() {
    let remote = Remote::new(full(4), Duration::from_millis(20), SMALL).await;
    let reader = remote.reader();
    let build = reader.open(remote.local.build).await.unwrap();
    let before = remote.store.gets.load(SeqCst);
    // Two opens of one build, as by two sandboxes.
    let sources = [remote.open(&reader).await, build.artifact(Artifact::Memfile).unwrap()];
    let reads = (0..40).map(|n| {
        let (source, expected) = (sources[n % 2].clone(), remote.bytes[100..2 * FRAME].to_vec());
        tokio::spawn(async move {
            let mut buf = vec![0; expected.len()];
            source.read_at(100, &mut buf).await.unwrap();
            assert_eq!(buf, expected);
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
    assert_eq!(remote.store.gets.load(SeqCst) - before, 2, "one fetch for each of two frames");
    assert_eq!(reader.stats().fetched, 2);
}

#[tokio::test]
async fn a_fetch_goes_on_when_its_reader_gives_up() {
    let remote = Remote::new(full(1), Duration::from_millis(30), SMALL).await;
    let reader = remote.reader();
    let source = remote.open(&reader).await;
    let read = source.read_at(0, &mut [0; 10]).await;
    read.unwrap();
    let other = remote.local.reader(&remote.store.remote(), "other", 1 << 20);
    let source = remote.open(&other).await;
    assert!(tokio::time::timeout(Duration::from_millis(1), source.read_at(0, &mut [0; 10])).await.is_err());
    let before = remote.store.gets.load(SeqCst);
    remote.check(&source, 0, 100).await;
    assert_eq!((other.stats().fetched, remote.store.gets.load(SeqCst) - before), (1, 1));
}

#[tokio::test]
async fn fetches_at_once_are_bounded() {
    let remote = Remote::new(full(64), Duration::from_millis(5), SMALL).await;
    let cache = FrameCache::open(remote.local.dir.path().join("cache"), 1 << 30).unwrap();
    let bounds = ReaderOptions { parallel: 3, ahead: 2, memory: 1 << 20 };
    let reader = RemoteReader::new(remote.store.remote(), cache, bounds, Handle::current());
    let source = remote.open(&reader).await;
    remote.store.most_at_once.store(0, SeqCst);
    let ahead = source.read_ahead(&AccessOrder::new(32..64), u64::MAX);
    remote.check(&source, 0, 32 * FRAME).await;
    ahead.done().await;
    let most = remote.store.most_at_once.load(SeqCst);
    assert!((4..=5).contains(&most), "{most}");
    assert_eq!(reader.stats().fetched, 64);
}

#[tokio::test]
async fn a_flipped_bit_is_fetched_again_and_then_an_error_that_says_where() {
    let remote = Remote::new(full(4), Duration::ZERO, SMALL).await;
    let reader = remote.reader();
    let source = remote.open(&reader).await;
    remote.store.damage.store(1, SeqCst);
    remote.check(&source, 0, FRAME).await;
    assert_eq!((reader.stats().damaged, reader.stats().fetched), (1, 2));

    remote.store.damage.store(u64::MAX, SeqCst);
    let error = source.read_at(FRAME as u64, &mut [0; FRAME]).await.unwrap_err();
    let RemoteError::Damaged { build, artifact, frame, .. } = &error else { panic!("{error}") };
    assert_eq!((*build, *artifact, *frame), (remote.local.build, Artifact::Memfile, 1));
    assert!(error.to_string().contains("memfile") && !error.is_passing(), "{error}");
    // Good bytes and bad ones. No more frames than the one that is waited for: a fetch goes on after a
    // failed read, and a later read would join it.
    assert!(source.read_at(0, &mut vec![0; 2 * FRAME]).await.is_err(), "no part of a read is wrong");
    remote.check(&source, 0, FRAME).await;
    // Once the store is well again, so are reads.
    remote.store.damage.store(0, SeqCst);
    remote.check(&source, 0, 4 * FRAME).await;
}

#[tokio::test]
async fn a_damaged_cached_frame_is_fetched_again() {
    let remote = Remote::new(full(4), Duration::ZERO, SMALL).await;
    remote.check(&remote.open(&remote.reader()).await, 0, 4 * FRAME).await;
    let dir = remote.local.dir.path().join("cache").join(remote.local.build.to_string());
    let flip = |frame: u32| {
        let path = dir.join(format!("memfile.{frame:08x}"));
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last / 2] ^= 4;
        fs::write(path, bytes).unwrap();
    };
    flip(1);
    fs::write(dir.join("memfile.00000002"), "torn").unwrap();

    // As after a restart: nothing is in memory.
    let reader = remote.reader();
    let source = remote.open(&reader).await;
    let gets = remote.store.gets.load(SeqCst);
    remote.check(&source, 0, 4 * FRAME).await;
    let stats = reader.stats();
    assert_eq!((stats.cached, stats.damaged, stats.fetched), (2, 2, 2));
    assert_eq!(remote.store.gets.load(SeqCst) - gets, 2);
    remote.check(&remote.open(&remote.reader()).await, 0, 4 * FRAME).await;
    assert_eq!(remote.store.gets.load(SeqCst) - gets, 2, "the good ones took their place");
}

#[tokio::test]
async fn an_open_build_keeps_its_frames_and_a_closed_one_makes_room() {
    let remote = Remote::new(full(6), Duration::ZERO, SMALL).await;
    let second = Remote { local: Local::with(&[(Artifact::Memfile, full(6))]).await, ..remote };
    second.store.remote().upload(&second.local.store, second.local.build, SMALL).await.unwrap();
    let remote_store = second.store.remote();
    // Each frame takes a block on the disk; memory holds none.
    let cache = FrameCache::open(second.local.dir.path().join("small"), 6 * 4096).unwrap();
    let bounds = ReaderOptions { memory: 0, ..Default::default() };
    let reader = RemoteReader::new(remote_store.clone(), cache, bounds, Handle::current());
    let other = remote_store.list().await.unwrap().into_iter().find(|b| *b != second.local.build).unwrap();

    let first = reader.open(other).await.unwrap().artifact(Artifact::Memfile).unwrap();
    second.check(&first, 0, 6 * FRAME).await;
    let source = second.open(&reader).await;
    second.check(&source, 0, 6 * FRAME).await;
    second.check(&first, 0, 6 * FRAME).await;
    assert_eq!(reader.stats().fetched, 12, "the first build's frames stayed");
    drop(first);
    second.check(&source, 0, 6 * FRAME).await;
    second.check(&source, 0, 6 * FRAME).await;
    assert_eq!(reader.stats().fetched, 18, "now they made room");
    assert_eq!(reader.cache().used(), 6 * 4096);
}

#[tokio::test]
async fn a_recorded_order_is_read_ahead_in_bounds() {
    let remote = Remote::new(full(20), Duration::ZERO, SMALL).await;
    let store = remote.store.remote();
    let first = remote.open(&remote.local.reader(&store, "first", 1 << 30)).await;
    for frame in [7, 3, 3, 15, 7] {
        remote.check(&first, frame * FRAME + 5, 10).await;
    }
    assert_eq!(first.recording().frames(), [7, 3, 15]);
    first.save_recording().await.unwrap();
    // The first one stays.
    remote.check(&first, 0, 10).await;
    first.save_recording().await.unwrap();

    let reader = remote.local.reader(&store, "second", 1 << 30);
    let source = remote.open(&reader).await;
    let order = store.order(remote.local.build, Artifact::Memfile).await.unwrap().unwrap();
    assert_eq!(order.frames(), [7, 3, 15]);
    source.read_ahead(&order, 2 * FRAME as u64).done().await;
    assert_eq!(reader.stats().fetched, 2, "no more than the limit");
    source.read_ahead_as_recorded(u64::MAX).done().await;
    assert_eq!(reader.stats().fetched, 3, "what is there is not fetched again");
    assert!(source.recording().frames().is_empty(), "reading ahead is no use");
    for frame in [7, 3, 15] {
        remote.check(&source, frame * FRAME, FRAME).await;
    }
    assert_eq!(reader.stats().fetched, 3);
    // An order of another artifact: what is not there is passed over.
    source.read_ahead(&AccessOrder::new([u32::MAX, 20, 1 << 20, 0]), u64::MAX).done().await;
    assert_eq!(reader.stats().fetched, 4);
}

#[tokio::test]
async fn a_dropped_read_ahead_ends() {
    let remote = Remote::new(full(200), Duration::from_millis(10), SMALL).await;
    let reader = remote.reader();
    let source = remote.open(&reader).await;
    let ahead = source.read_ahead(&AccessOrder::new(0..200), u64::MAX);
    while reader.stats().fetched == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(ahead);
    // Those that were on their way land; a read of the last waits for no other.
    remote.check(&source, 199 * FRAME, FRAME).await;
    assert!(reader.stats().fetched < 100, "{:?}", reader.stats());
}

/// A disk of 64 KiB, in a mount namespace of this test's thread: reads go on without the cache.
#[test]
fn a_full_disk_costs_the_cache_alone() {
    let worker = std::thread::spawn(|| {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNS) {
            return println!("no mount namespace: {e}");
        }
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let noise: Vec<u8> = content(9, 40 * FRAME).iter().map(|b| b | 1).collect();
            let remote = Remote::new(noise, Duration::ZERO, SMALL).await;
            let dir = remote.local.dir.path().join("cache");
            fs::create_dir(&dir).unwrap();
            mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
            let device = fs::metadata(&dir).unwrap().dev();
            assert_ne!(device, fs::metadata(remote.local.dir.path()).unwrap().dev());
            let reader = remote.reader();
            let source = remote.open(&reader).await;
            remote.check(&source, 0, 40 * FRAME).await;
            assert!(reader.cache().used() < 40 * FRAME as u64, "the disk was full");
            assert!(reader.cache().used() > 0);
            assert_eq!(fs::read_dir(dir.join(".tmp")).unwrap().count(), 0);
        });
    });
    worker.join().unwrap();
}
