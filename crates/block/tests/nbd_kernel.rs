//! Kernel NBD devices, with a real kernel. Where it has none, each test says so; `make testbed` runs
//! them in a machine that has.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod kernel;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kernel::{
    Aligned, Daemon, SIZE, Watched, config, contents, devices, impatient, on_thread, open, open_direct,
    options, pattern, read_direct, run, sysfs,
};
use nidus_block::nbd::kernel::{AttachError, DetachError, DevicePool, PoolConfig, PoolStatus};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn direct_and_buffered_io_reach_the_overlay_and_come_back() {
    let Some(devices) = devices().await else { return };
    let overlay = devices.overlay(1).await;
    let device = devices.pool().await.acquire(overlay.clone(), options(4)).await.unwrap();
    assert_eq!(sysfs(&device, "size").parse::<u64>().unwrap() * 512, SIZE);
    assert_eq!(sysfs(&device, "queue/logical_block_size"), "4096");
    // A queue for each connection, as far as there are processors.
    let processors = std::thread::available_parallelism().unwrap().get();
    assert_eq!(std::fs::read_dir(sysfs_dir(&device, "mq")).unwrap().count(), processors.min(4));
    let path = device.path().to_owned();
    let expected = on_thread(move || {
        let (direct, buffered) = (open_direct(&path), open(&path));
        let part = direct.write_at(&Aligned::new(512, 0)[..], 0);
        assert_eq!(part.unwrap_err().kind(), io::ErrorKind::InvalidInput, "a part of a block was written");
        let mut expected = pattern(1);
        let mut rng = SmallRng::seed_from_u64(1);
        for round in 0..200 {
            let fill = rng.random();
            if round % 2 == 0 {
                let (start, len) = (rng.random_range(0..8000) * 4096, rng.random_range(1..64) * 4096);
                direct.write_all_at(&Aligned::new(len, fill), start as u64).unwrap();
                expected[start..start + len].fill(fill);
            } else {
                // Also parts of blocks: the kernel reads the rest.
                let (start, len) = (rng.random_range(0..32 << 20), rng.random_range(1..200_000));
                let start = (32 << 20) + start.min((32 << 20) - len);
                buffered.write_all_at(&vec![fill; len], start as u64).unwrap();
                expected[start..start + len].fill(fill);
            }
        }
        buffered.sync_all().unwrap();
        let mut back = Aligned::new(SIZE as usize, 0);
        direct.read_exact_at(&mut back, 0).unwrap();
        assert!(*back == expected[..], "direct reads differ from what was written");
        expected
    })
    .await;
    assert!(contents(&*overlay).await == expected, "the overlay differs from what was written");
    device.detach().await.unwrap();
}

fn sysfs_dir(device: &nidus_block::nbd::kernel::AttachedDevice, name: &str) -> String {
    format!("/sys/block/{}/{name}", device.path().file_name().unwrap().display())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fsync_flushes_the_overlay_and_so_does_detaching() {
    let Some(devices) = devices().await else { return };
    let watched = Watched::new(devices.overlay(1).await, 0);
    let device = devices.pool().await.acquire(watched.clone(), options(2)).await.unwrap();
    let path = device.path().to_owned();
    on_thread(move || {
        let file = open(&path);
        file.write_all_at(b"kept", 5000).unwrap();
        file.sync_all().unwrap();
    })
    .await;
    let flushes = watched.flushes.load(Ordering::SeqCst);
    assert!(flushes > 0, "fsync did not flush");
    assert_eq!(&contents(&*watched).await[5000..5004], b"kept");
    // No fsync: what the page cache has goes out when the device is detached.
    let path = device.path().to_owned();
    on_thread(move || open(&path).write_all_at(b"late", 9000).unwrap()).await;
    device.detach().await.unwrap();
    assert_eq!(&contents(&*watched).await[9000..9004], b"late");
    assert!(watched.flushes.load(Ordering::SeqCst) > flushes, "detaching did not flush");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discarded_blocks_read_as_zeros() {
    let Some(devices) = devices().await else { return };
    let overlay = devices.overlay(1).await;
    let device = devices.pool().await.acquire(overlay.clone(), options(2)).await.unwrap();
    let path = device.path().to_owned();
    on_thread(move || run("blkdiscard", &["-o", "1048576", "-l", "2097152", path.to_str().unwrap()])).await;
    let mut expected = pattern(1);
    expected[1 << 20..3 << 20].fill(0);
    assert!(contents(&*overlay).await == expected);
    device.detach().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_lives_through_attaching_again() {
    let Some(devices) = devices().await else { return };
    let patient = PoolConfig { hold_limit: Duration::from_secs(60), ..config() };
    let pool = DevicePool::open(patient).await.unwrap();
    let overlay = devices.overlay(1).await;
    let mount_point = devices.dir.path().join("mnt");
    std::fs::create_dir(&mount_point).unwrap();
    let at = mount_point.clone();
    let device = pool.acquire(overlay.clone(), options(4)).await.unwrap();
    let node = device.path().to_str().unwrap().to_owned();
    let data: Vec<u8> = (0..5_000_000u32).flat_map(u32::to_le_bytes).collect();
    let written = data.clone();
    on_thread(move || {
        run("mke2fs", &["-q", "-t", "ext4", &node]);
        run("mount", &[&node, at.to_str().unwrap()]);
        std::fs::write(at.join("data"), &written).unwrap();
        run("umount", &[at.to_str().unwrap()]);
        run("e2fsck", &["-fn", &node]);
    })
    .await;
    device.detach().await.unwrap();
    let device = pool.acquire(overlay, options(1)).await.unwrap();
    let node = device.path().to_str().unwrap().to_owned();
    let at = mount_point.clone();
    let read = on_thread(move || {
        run("mount", &["-o", "ro", &node, at.to_str().unwrap()]);
        std::fs::read(at.join("data"))
    })
    .await;
    assert!(read.unwrap() == data, "the file differs");
    // A mount holds the device as well as an open file.
    let detaching = tokio::spawn(device.detach());
    let at = mount_point.join("data");
    on_thread(move || (0..20).for_each(|_| assert!(std::fs::read(&at).unwrap() == data))).await;
    assert!(!detaching.is_finished());
    on_thread(move || run("umount", &[mount_point.to_str().unwrap()])).await;
    detaching.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detaching_waits_for_those_who_have_the_device_open() {
    let Some(devices) = devices().await else { return };
    let patient = PoolConfig { hold_limit: Duration::from_secs(60), ..config() };
    let pool = DevicePool::open(patient).await.unwrap();
    let device = pool.acquire(devices.overlay(1).await, options(2)).await.unwrap();
    let path = device.path().to_owned();
    let file = open(&path);
    let mut detaching = tokio::spawn(device.detach());
    // As long as it is open, the device works: reads go to the server, not to a cache.
    for block in 0..100 {
        let reading = path.clone();
        on_thread(move || read_direct(&reading, block * 4096, 4096).unwrap()).await;
    }
    assert!(!detaching.is_finished());
    drop(file);
    (&mut detaching).await.unwrap().unwrap();
    assert_eq!(pool.status().attached, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_still_held_is_put_in_quarantine() {
    let Some(devices) = devices().await else { return };
    let pool = devices.pool().await;
    let before = pool.status();
    let device = pool.acquire(devices.overlay(1).await, options(2)).await.unwrap();
    let path = device.path().to_owned();
    let file = open_direct(&path);
    let error = device.detach().await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, DetachError::Quarantined { .. }), "{text}");
    assert!(text.contains(&format!("process {} ", std::process::id())), "{text}");
    // It does not hang its holder.
    let reading = on_thread(move || file.read_at(&mut Aligned::new(4096, 0), 0)).await;
    assert!(reading.is_err());
    let after = pool.status();
    assert_eq!((after.free, after.attached), (before.free - 1, 0));
    assert_eq!(after.quarantined.last().unwrap().node, path);
    // It is not handed out, whatever else is asked of the pool.
    let overlay = devices.overlay(2).await;
    for _ in 0..after.free + 1 {
        let other = pool.acquire(overlay.clone(), options(1)).await.unwrap();
        assert_ne!(other.path(), path);
        other.detach().await.unwrap();
    }
    // The holder has closed it: a new pool finds it free.
    assert_eq!(devices.pool().await.status(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_rounds_leave_nothing_behind() {
    let Some(devices) = devices().await else { return };
    let pool = devices.pool().await;
    let overlay = devices.overlay(1).await;
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let round = async || {
        let device = pool.acquire(overlay.clone(), options(3)).await.unwrap();
        let path = device.path().to_owned();
        on_thread(move || read_direct(&path, 0, 4096).unwrap()).await;
        device.detach().await.unwrap();
    };
    round().await;
    let (before, files) = (pool.status(), count());
    for _ in 0..100 {
        round().await;
    }
    assert_eq!(pool.status(), before);
    assert_eq!(count(), files);
    assert_eq!(Arc::strong_count(&overlay), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_shows_nothing_of_what_it_was_before() {
    let Some(devices) = devices().await else { return };
    let pool = DevicePool::open(PoolConfig { limit: 1, ..config() }).await.unwrap();
    for seed in [1, 2, 1] {
        let device = pool.acquire(devices.overlay(seed).await, options(2)).await.unwrap();
        let path = device.path().to_owned();
        let read = on_thread(move || {
            let mut bytes = vec![0; SIZE as usize];
            open(&path).read_exact_at(&mut bytes, 0).unwrap();
            bytes
        });
        assert!(read.await == pattern(seed), "the page cache shows another device");
        device.detach().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_pool_says_so_and_recovers() {
    let Some(devices) = devices().await else { return };
    let pool = DevicePool::open(PoolConfig { limit: 2, ..config() }).await.unwrap();
    let overlay = devices.overlay(1).await;
    let first = pool.acquire(overlay.clone(), options(1)).await.unwrap();
    let second = pool.acquire(overlay.clone(), options(1)).await.unwrap();
    let error = pool.acquire(overlay.clone(), options(1)).await.unwrap_err();
    assert!(matches!(error, AttachError::Exhausted { attached: 2, quarantined: 0 }), "{error}");
    first.detach().await.unwrap();
    let third = pool.acquire(overlay.clone(), options(1)).await.unwrap();
    // Dropping detaches too, and shutting down waits for it.
    drop((second, third));
    pool.shutdown().await;
    assert_eq!(pool.status(), PoolStatus { free: 2, attached: 0, quarantined: vec![] });
    let error = pool.acquire(overlay, options(1)).await.unwrap_err();
    assert!(matches!(error, AttachError::Shutdown), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attach_that_nobody_waits_for_is_undone() {
    let Some(devices) = devices().await else { return };
    let pool = devices.pool().await;
    let before = pool.status();
    let overlay = devices.overlay(1).await;
    for _ in 0..10 {
        let attaching = pool.acquire(overlay.clone(), options(2));
        // Polled once, so that it has begun, and dropped.
        assert!(futures::FutureExt::now_or_never(attaching).is_none());
    }
    pool.shutdown().await;
    assert_eq!(pool.status(), before);
    assert_eq!(Arc::strong_count(&overlay), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_replaced_and_nothing_is_lost() {
    let Some(devices) = devices().await else { return };
    let watched = Watched::new(devices.overlay(1).await, 2);
    // With one connection the request waits for the new one.
    let device = devices.pool().await.acquire(watched.clone(), impatient(1)).await.unwrap();
    let path = device.path().to_owned();
    let read = on_thread(move || read_direct(&path, Watched::BREAK_AT, 4096)).await.unwrap();
    let at = Watched::BREAK_AT as usize;
    assert!(read == pattern(1)[at..at + 4096]);
    assert_eq!(watched.breaks.load(Ordering::SeqCst), 0);
    assert!(!device.lost().is_cancelled());
    device.detach().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_without_connections_fails_and_is_freed() {
    let Some(devices) = devices().await else { return };
    let pool = devices.pool().await;
    let before = pool.status().free;
    let device = pool.acquire(Watched::new(devices.overlay(1).await, u64::MAX), impatient(1)).await.unwrap();
    let (path, lost) = (device.path().to_owned(), device.lost());
    let error = on_thread(move || read_direct(&path, Watched::BREAK_AT, 4096)).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32));
    lost.cancelled().await;
    device.detach().await.unwrap();
    assert_eq!(pool.status().free, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemons_device_fails_and_is_taken_back() {
    let Some(devices) = devices().await else { return };
    let before = devices.pool().await.status();
    let daemon = Daemon::start(kernel::INSTANCE, devices.dir.path());
    let node = daemon.node.clone();
    // Another pool, of whatever name, leaves a living daemon's device alone.
    let beside = devices.pool().await.status();
    let reason = &beside.quarantined.iter().find(|q| q.node == node).unwrap().reason;
    assert!(reason.contains(&format!("process {}", daemon.child.id())), "{reason}");
    assert_eq!(beside.free, before.free - 1);
    let (told, writes) = std::sync::mpsc::channel();
    let path = node.clone();
    let writing = tokio::task::spawn_blocking(move || {
        let file = open_direct(&path);
        let block = Aligned::new(4096, 7);
        (0..).find_map(|i| {
            let result = file.write_all_at(&block, i % 1000 * 4096);
            let _ = told.send(());
            result.err()
        })
    });
    // In the middle of its work.
    writes.iter().take(100).for_each(drop);
    daemon.kill();
    let error = writing.await.unwrap().unwrap();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32));
    // A pool of another installation does not touch it; one of the same takes it back.
    let others = DevicePool::open(PoolConfig { instance: "other".into(), ..config() }).await.unwrap();
    assert!(others.status().quarantined.iter().any(|q| q.node == node));
    let pool = devices.pool().await;
    assert_eq!(pool.status(), before);
    let all: Vec<_> = futures::future::join_all(
        (0..before.free).map(async |_| pool.acquire(devices.overlay(1).await, options(1)).await.unwrap()),
    )
    .await;
    assert!(all.iter().any(|d| d.path() == node), "the device is not used again");
    for device in all {
        device.detach().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_someone_else_took_is_skipped() {
    let Some(devices) = devices().await else { return };
    // The pool believes that all devices are free; then another daemon takes the first.
    let pool = devices.pool().await;
    let daemon = Daemon::start("other", devices.dir.path());
    let device = pool.acquire(devices.overlay(1).await, options(2)).await.unwrap();
    assert_ne!(device.path(), daemon.node);
    let quarantined = pool.status().quarantined;
    assert_eq!(quarantined.last().unwrap().node, daemon.node);
    let path = daemon.node.clone();
    let read = on_thread(move || read_direct(&path, 0, 4096).unwrap()).await;
    assert!(read == pattern(9)[..4096], "the other daemon's device was disturbed");
    device.detach().await.unwrap();
    daemon.kill();
    // Clean up in its name.
    let theirs = DevicePool::open(PoolConfig { instance: "other".into(), ..config() }).await.unwrap();
    assert_eq!(theirs.status().quarantined, vec![]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_attached_is_refused() {
    let Some(devices) = devices().await else { return };
    let pool = devices.pool().await;
    let before = pool.status();
    let error = pool.acquire(devices.overlay(1).await, options(17)).await.unwrap_err();
    assert!(matches!(error, AttachError::Connections(17)), "{error}");
    let odd = devices.dir.path().join("odd");
    std::fs::write(&odd, vec![0; 10_000]).unwrap();
    let base = Arc::new(nidus_block::FileDevice::open(odd).await.unwrap());
    let overlay = nidus_block::Overlay::create(base, devices.dir.path().join("odd-cache")).await.unwrap();
    let error = pool.acquire(Arc::new(overlay), options(1)).await.unwrap_err();
    assert!(matches!(error, AttachError::Unaligned { size: 10_000, block: 4096 }), "{error}");
    assert_eq!(pool.status(), before);
}

#[tokio::test]
async fn a_host_without_the_module_is_told_what_to_do() {
    if nidus_block::nbd::kernel::probe().is_ok() {
        eprintln!("skipped: this host has NBD devices");
        return;
    }
    let error = DevicePool::open(config()).await.err().unwrap().to_string();
    assert!(error.contains("modprobe nbd nbds_max=64"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of other tests: the process that they kill"]
async fn another_daemon() {
    kernel::be_a_daemon().await;
}
