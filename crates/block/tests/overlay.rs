//! The overlay against a plain byte array, side by side and one after another.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use nidus_block::{BLOCK_SIZE, BlockDevice, BlockError, FileDevice, Frozen, Overlay, ReadDevice, Zeroing};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::sync::Notify;

/// Not a multiple of the block size: the last block is short.
const SIZE: usize = 20 * BLOCK_SIZE as usize - 700;

fn template(dir: &TempDir) -> Vec<u8> {
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8 + 1).collect();
    std::fs::write(dir.path().join("rootfs"), &bytes).unwrap();
    bytes
}

async fn overlay(dir: &TempDir) -> Overlay {
    let base = FileDevice::open(dir.path().join("rootfs")).await.unwrap();
    Overlay::create(Arc::new(base), dir.path().join("cache")).await.unwrap()
}

/// Reads once: what others write meanwhile may or may not be seen.
async fn read_once(device: &dyn ReadDevice, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    device.read_at(offset, &mut buf).await.unwrap();
    buf
}

/// Reads in both ways, which must agree as long as nobody writes.
async fn read(device: &dyn ReadDevice, offset: u64, len: usize) -> Vec<u8> {
    let buf = read_once(device, offset, len).await;
    let mut again = vec![0xdd; len];
    if device.try_read_at(offset, &mut again).unwrap() {
        assert!(buf == again, "two reads of {len} bytes at {offset} differ");
    }
    buf
}

#[derive(Debug, Clone)]
enum Op {
    Read,
    Write(u8),
    Zero(Zeroing),
    Trim,
    Flush,
    Freeze,
    Merge,
    /// Lets go of what was frozen without merging it.
    Thaw,
}

fn op() -> impl Strategy<Value = (Op, usize, usize)> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        6 => any::<u8>().prop_map(Op::Write),
        1 => Just(Op::Zero(Zeroing::Hole)),
        1 => Just(Op::Zero(Zeroing::Allocate)),
        1 => Just(Op::Trim),
        1 => Just(Op::Flush),
        2 => Just(Op::Freeze),
        1 => Just(Op::Merge),
        1 => Just(Op::Thaw),
    ];
    // Aligned and unaligned, within a block and over many.
    let len = prop_oneof![0usize..64, Just(4096), Just(8192), 0usize..30_000];
    let offset = prop_oneof![0usize..=SIZE, (0usize..20).prop_map(|b| b * 4096)];
    (op, offset, len).prop_map(|(op, offset, len)| (op, offset, len.min(SIZE - offset)))
}

/// What was frozen over the original is the device as it was then.
fn check_frozen(frozen: &Frozen, original: &[u8], then: &[u8], touched: &[bool]) {
    let mut rebuilt = original.to_vec();
    let mut blocks = vec![false; touched.len()];
    for range in frozen.ranges() {
        let bytes = range.start as usize..range.end as usize;
        frozen.read_blocking(range.start, &mut rebuilt[bytes.clone()]).unwrap();
        blocks[bytes.start / 4096..bytes.end.div_ceil(4096)].fill(true);
    }
    assert!(rebuilt == then);
    assert_eq!(blocks, touched);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn it_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = TempDir::new().unwrap();
            let original = template(&dir);
            let mut model = original.clone();
            let mut touched = vec![false; SIZE.div_ceil(BLOCK_SIZE as usize)];
            let overlay = overlay(&dir).await;
            let mut frozen: Option<(Frozen, Vec<u8>, Vec<bool>)> = None;
            for (op, offset, len) in ops {
                let range = offset..offset + len;
                let at = offset as u64;
                match op {
                    Op::Read => assert_eq!(read(&overlay, at, len).await, &model[range]),
                    Op::Flush => overlay.flush().await.unwrap(),
                    Op::Freeze => {
                        // There is one at a time.
                        drop(frozen.take());
                        frozen = Some((overlay.freeze().await.unwrap(), model.clone(), touched.clone()));
                    }
                    Op::Merge | Op::Thaw => {
                        let Some((it, then, touched)) = frozen.take() else { continue };
                        check_frozen(&it, &original, &then, &touched);
                        if matches!(op, Op::Merge) {
                            overlay.merge(it).await.unwrap();
                            // What was written since, and one layer for all before.
                            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
                        }
                        assert_eq!(read(&overlay, 0, SIZE).await, model);
                    }
                    change => {
                        match change {
                            Op::Write(seed) => {
                                let data: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(seed)).collect();
                                model[range.clone()].copy_from_slice(&data);
                                overlay.write_at(at, data.into()).await.unwrap();
                            }
                            Op::Zero(how) => overlay.write_zeroes(at, len as u64, how).await.unwrap(),
                            _ => overlay.trim(at, len as u64).await.unwrap(),
                        }
                        if !matches!(change, Op::Write(_)) {
                            model[range.clone()].fill(0);
                        }
                        if len > 0 {
                            touched[range.start / 4096..range.end.div_ceil(4096)].fill(true);
                        }
                    }
                }
            }
            assert_eq!(read(&overlay, 0, SIZE).await, model);
            let dirty = overlay.dirty();
            assert!((0..dirty.blocks()).all(|b| dirty.contains(b) == touched[b as usize]));
            drop(frozen);
            check_frozen(&overlay.freeze().await.unwrap(), &original, &model, &touched);
            drop(overlay);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the base alone is left");
        });
    }
}

/// A device whose reads wait until they are let go, one by one.
struct Slow {
    inner: FileDevice,
    asked: Arc<Notify>,
    go: Arc<Notify>,
}

#[async_trait]
impl ReadDevice for Slow {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn try_read_at(&self, _: u64, _: &mut [u8]) -> Result<bool, BlockError> {
        Ok(false)
    }
    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.asked.notify_one();
        self.go.notified().await;
        self.inner.read_at(offset, buf).await
    }
}

/// The rest of a block comes up slowly; meanwhile others write to the same block.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_to_one_block_lose_no_bytes_to_one_another() {
    let dir = TempDir::new().unwrap();
    let original = template(&dir);
    let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let base = Slow {
        inner: FileDevice::open(dir.path().join("rootfs")).await.unwrap(),
        asked: asked.clone(),
        go: go.clone(),
    };
    let overlay = Arc::new(Overlay::create(Arc::new(base), dir.path().join("cache")).await.unwrap());
    let write = |offset: u64, len: usize, byte: u8| {
        let overlay = overlay.clone();
        tokio::spawn(async move { overlay.write_at(offset, vec![byte; len].into()).await.unwrap() })
    };
    let first = write(4096 + 10, 10, 0xa1);
    asked.notified().await;
    // The first is now half-way: it has asked for the rest of the block and not written.
    let partial = write(4096 + 100, 10, 0xa2);
    let whole = write(8192, 4096, 0xa3);
    tokio::task::yield_now().await;
    // Let every read from below go, however many there are.
    let pump = tokio::spawn(async move {
        loop {
            go.notify_one();
            tokio::task::yield_now().await;
        }
    });
    for task in [first, partial, whole] {
        task.await.unwrap();
    }
    let mut expected = original;
    expected[4096 + 10..4096 + 20].fill(0xa1);
    expected[4096 + 100..4096 + 110].fill(0xa2);
    expected[8192..12288].fill(0xa3);
    assert_eq!(read(overlay.as_ref(), 0, SIZE).await, expected);
    pump.abort();
}

/// A guest that writes all the time, while what it has is frozen and merged again and again: no write
/// is lost, and what is frozen does not change.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_frozen_stands_still_under_writers() {
    let dir = TempDir::new().unwrap();
    template(&dir);
    let overlay = Arc::new(overlay(&dir).await);
    let writers: Vec<_> = (0..2u64)
        .map(|half| {
            let overlay = overlay.clone();
            tokio::spawn(async move {
                for n in 0..400u64 {
                    // Half a block each, so that the rest must come up from frozen layers.
                    let at = n * 7 % 19 * 4096 + half * 2048;
                    let data = vec![n as u8; 2048];
                    if !overlay.try_write_at(at, &data).unwrap() {
                        overlay.write_at(at, data.into()).await.unwrap();
                    }
                }
            })
        })
        .collect();
    let content = |frozen: &Frozen| -> Vec<Vec<u8>> {
        let read = |r: std::ops::Range<u64>| {
            let mut bytes = vec![0; (r.end - r.start) as usize];
            frozen.read_blocking(r.start, &mut bytes).unwrap();
            bytes
        };
        frozen.ranges().into_iter().map(read).collect()
    };
    let mut rounds = 0;
    while rounds < 5 || writers.iter().any(|w| !w.is_finished()) {
        let frozen = overlay.freeze().await.unwrap();
        let first = content(&frozen);
        tokio::task::yield_now().await;
        assert!(content(&frozen) == first);
        match rounds % 3 {
            0 => drop(frozen),
            _ => overlay.merge(frozen).await.unwrap(),
        }
        rounds += 1;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let found = read(overlay.as_ref(), 0, 19 * 4096).await;
    for (n, half) in found.chunks(2048).enumerate() {
        let block = n as u64 / 2;
        let last = (0..400u64).rev().find(|n| n * 7 % 19 == block).unwrap();
        assert!(half.iter().all(|b| *b == last as u8), "block {block}");
    }
}

/// Many writers at once, each with bytes of its own in every block, and readers that must see each
/// byte either old or new.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_writers_and_readers_see_old_or_new_bytes() {
    const WRITERS: usize = 8;
    const STRIPE: usize = 4096 / WRITERS;
    for round in 0..20 {
        let dir = TempDir::new().unwrap();
        let original = template(&dir);
        let overlay = Arc::new(overlay(&dir).await);
        let mut tasks = Vec::new();
        for writer in 0..WRITERS {
            let overlay = overlay.clone();
            tasks.push(tokio::spawn(async move {
                for block in (0..16).rev().chain(0..16) {
                    let at = block * 4096 + writer * STRIPE;
                    overlay.write_at(at as u64, vec![0xf0 + writer as u8; STRIPE].into()).await.unwrap();
                    // What was written is there.
                    assert_eq!(
                        read(overlay.as_ref(), at as u64, STRIPE).await,
                        vec![0xf0 + writer as u8; STRIPE]
                    );
                }
            }));
        }
        for reader in 0..3 {
            let (overlay, original) = (overlay.clone(), original.clone());
            tasks.push(tokio::spawn(async move {
                for i in 0..40 {
                    let at = (reader * 1234 + i * 777 + round) % (15 * 4096);
                    for (n, byte) in
                        read_once(overlay.as_ref(), at as u64, 5000).await.into_iter().enumerate()
                    {
                        let (n, new) = (at + n, 0xf0 + ((at + n) % 4096 / STRIPE) as u8);
                        assert!(byte == original[n] || byte == new, "byte {n} is {byte:#x}");
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        for (n, byte) in read(overlay.as_ref(), 0, 16 * 4096).await.into_iter().enumerate() {
            assert_eq!(byte, 0xf0 + (n % 4096 / STRIPE) as u8, "byte {n} of round {round}");
        }
    }
}

#[tokio::test]
async fn what_lies_beyond_the_device_is_refused() {
    let dir = TempDir::new().unwrap();
    template(&dir);
    let overlay = overlay(&dir).await;
    let size = SIZE as u64;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let mut buf = vec![0; len];
        let out = |r: Result<(), BlockError>| matches!(r, Err(BlockError::OutOfRange { .. }));
        assert!(out(overlay.read_at(offset, &mut buf).await));
        assert!(out(overlay.try_read_at(offset, &mut buf).map(drop)));
        assert!(out(overlay.write_at(offset, Bytes::from(buf)).await));
        assert!(out(overlay.trim(offset, len as u64).await));
    }
    overlay.write_at(size, Bytes::new()).await.unwrap();
    assert_eq!(overlay.dirty().count(), 0);
}

#[tokio::test]
async fn an_existing_cache_file_is_neither_used_nor_removed() {
    let dir = TempDir::new().unwrap();
    template(&dir);
    std::fs::write(dir.path().join("cache"), "another's").unwrap();
    let base = Arc::new(FileDevice::open(dir.path().join("rootfs")).await.unwrap());
    let error = Overlay::create(base, dir.path().join("cache")).await.err().unwrap();
    assert!(error.to_string().contains("cannot create"), "{error}");
    assert_eq!(std::fs::read(dir.path().join("cache")).unwrap(), b"another's");
}

#[tokio::test]
async fn a_template_cut_short_is_an_error_not_zeros() {
    let dir = TempDir::new().unwrap();
    template(&dir);
    let overlay = overlay(&dir).await;
    std::fs::File::options().write(true).open(dir.path().join("rootfs")).unwrap().set_len(5000).unwrap();
    let mut buf = vec![0; 4096];
    let error = overlay.read_at(8192, &mut buf).await.unwrap_err();
    assert!(matches!(error, BlockError::Truncated { .. }), "{error}");
}

/// In a thread with a mount namespace of its own, whose mounts go with it.
#[test]
fn a_full_disk_fails_the_write_and_shows_none_of_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let test = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let (dir, small) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        mount(Some("nidus-test"), small.path(), Some("tmpfs"), MsFlags::empty(), Some("size=32k")).unwrap();
        let original = template(&dir);
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let base = Arc::new(FileDevice::open(dir.path().join("rootfs")).await.unwrap());
            let overlay = Overlay::create(base, small.path().join("cache")).await.unwrap();
            let error = overlay.write_at(0, vec![9; 15 * 4096].into()).await.unwrap_err();
            assert!(matches!(error, BlockError::NoSpace { .. }), "{error}");
            assert!(error.to_string().contains("no space left"), "{error}");
            assert_eq!(overlay.dirty().count(), 0);
            assert_eq!(read(&overlay, 0, SIZE).await, original);
            // Zeroing shows nothing of the failed write either, and makes room.
            overlay.trim(0, 15 * 4096).await.unwrap();
            assert_eq!(read(&overlay, 0, 15 * 4096).await, vec![0; 15 * 4096]);
            overlay.write_at(4096, vec![8; 4096].into()).await.unwrap();
            assert_eq!(read(&overlay, 4096, 4096).await, vec![8; 4096]);
        });
        nix::mount::umount(small.path()).unwrap();
    };
    std::thread::spawn(test).join().unwrap();
}

/// Lets the other thread pass every barrier when this one ends, even by a panic.
struct Release(Arc<std::sync::atomic::AtomicU64>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.store(u64::MAX / 2, std::sync::atomic::Ordering::SeqCst);
    }
}

/// Two threads meet at every block and write to different parts of it at the same instant, so that
/// now and then both find the block still below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_writes_to_one_block_at_the_same_instant_are_both_kept() {
    const BLOCKS: u64 = 2000;
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("rootfs"), vec![1; (BLOCKS * BLOCK_SIZE) as usize]).unwrap();
    let overlay = Arc::new(overlay(&dir).await);
    let arrived = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let writer = |offset: u64, byte: u8| {
        let (overlay, arrived, runtime) =
            (overlay.clone(), arrived.clone(), tokio::runtime::Handle::current());
        std::thread::spawn(move || {
            let _release = Release(arrived.clone());
            let mut spins = 0u64;
            for block in 0..BLOCKS {
                // A spinning barrier: both leave within nanoseconds of one another.
                arrived.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                while arrived.load(std::sync::atomic::Ordering::SeqCst) < 2 * (block + 1) {
                    std::hint::spin_loop();
                    spins += 1;
                    if spins.is_multiple_of(10_000) {
                        // The other may be waiting for this processor.
                        std::thread::yield_now();
                    }
                }
                let data = Bytes::from(vec![byte; 100]);
                runtime.block_on(overlay.write_at(block * BLOCK_SIZE + offset, data)).unwrap();
            }
        })
    };
    let writers = [writer(0, 2), writer(2000, 3)];
    tokio::task::spawn_blocking(|| writers.map(|w| w.join().unwrap())).await.unwrap();
    let mut expected = vec![1; BLOCK_SIZE as usize];
    expected[..100].fill(2);
    expected[2000..2100].fill(3);
    for block in 0..BLOCKS {
        let found = read(overlay.as_ref(), block * BLOCK_SIZE, BLOCK_SIZE as usize).await;
        assert!(found == expected, "block {block} lost bytes");
    }
}
