//! Prefetch in recorded order.

use nidus_memory::{
    PageSize,
    uffd::{Config, OtherMemory, Recorded, Recording},
};
use tokio::time::timeout;

use crate::rig::{AtHand, Does, PAGE, PATIENCE, PLAIN, Rig, Storage, content};

const PAGES: usize = 256;
const SIZE: usize = PAGES * PAGE;

fn wait(rig: &Rig, recording: &Recording) -> bool {
    let mut prefetch = rig.handler().prefetch(recording).unwrap();
    rig.runtime.block_on(async { timeout(PATIENCE, prefetch.finished()).await }).expect("it hangs")
}

#[test]
fn what_one_vm_needed_another_has_before_it_asks() {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    let mut first = Rig::new(PLAIN, source.clone(), Config::default());
    for page in [9, 2, 3, 200, 33] {
        first.vmm.call(&format!("touch {} {PAGE} 1", page * PAGE));
    }
    first.vmm.call(&format!("write {} 1 1", 13 * PAGE));
    first.touched();
    let recording = Recording::parse(&first.handler().recording().to_bytes()).unwrap();
    let order: Vec<_> = recording.pages().iter().map(|recorded| (recorded.page, recorded.write)).collect();
    assert_eq!(order, [(9, false), (2, false), (3, false), (200, false), (33, false), (13, true)]);
    first.finish();

    let mut second = Rig::new(PLAIN, source, Config::default());
    second.vmm.call(&format!("touch {} {PAGE} 1", 2 * PAGE));
    assert!(wait(&second, &recording));
    let metrics = second.metrics();
    assert_eq!((metrics.prefetched, metrics.prefetch_skipped), (5, 1));
    for page in [9, 2, 3, 200, 33, 13] {
        second.vmm.call(&format!("touch {} {PAGE} 1", page * PAGE));
    }
    let metrics = second.metrics();
    assert_eq!(metrics.faults_cache + metrics.faults_zero, 1, "{metrics:?}");
    assert!(second.vmm.dump(0, SIZE) == bytes);
    let other = Recording::new(PageSize::Small, 2 * SIZE as u64, []);
    assert_eq!(second.handler().prefetch(&other).unwrap_err(), OtherMemory);
    assert!(wait(&second, &Recording::new(PageSize::Small, SIZE as u64, [])));
    second.finish();
}

fn all_pages() -> Recording {
    let pages = (0..PAGES as u32).rev().map(|page| Recorded { page, write: page % 2 == 0 });
    Recording::new(PageSize::Small, SIZE as u64, pages)
}

#[test]
fn prefetch_and_faults_on_the_same_pages_at_once() {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    for readers in [1, 2] {
        let mut rig = Rig::new(PLAIN, source.clone(), Config { readers, ..Config::default() });
        rig.vmm.send(&format!("touch 0 {SIZE} 3"));
        assert!(wait(&rig, &all_pages()));
        rig.vmm.reply().unwrap();
        assert!(rig.vmm.dump(0, SIZE) == bytes);
        let metrics = rig.metrics();
        let put = metrics.prefetched + metrics.faults_cache + metrics.faults_zero;
        assert_eq!((put, metrics.put_off), (PAGES as u64, 0), "{metrics:?}");
        rig.finish();
    }
}

#[test]
fn a_prefetch_from_storage_is_bounded_and_gives_way_to_faults() {
    let bytes = content(SIZE);
    // What is prefetched first waits until it is let go; what is asked for a second time, by a
    // fault, is answered.
    let storage =
        Storage::new(bytes.clone(), PAGE, |_, attempt| if attempt == 1 { Does::Wait } else { Does::Answer });
    let config = Config { prefetch_fetches: 3, ..Config::default() };
    let mut rig = Rig::new(PLAIN, storage.clone(), config);
    let mut prefetch = rig.handler().prefetch(&all_pages()).unwrap();
    let last = PAGES - 1;
    // All three: their tasks begin in any order.
    while (last - 2..=last).any(|page| storage.attempts(page) == 0) {
        std::thread::yield_now();
    }
    // Three are being fetched, the fourth must wait; yet a fault on one of the three does not.
    assert_eq!(storage.attempts(last - 3), 0);
    rig.vmm.call(&format!("touch {} {PAGE} 1", last * PAGE));
    assert_eq!((storage.attempts(last), storage.attempts(last - 3)), (2, 0));
    storage.release.add_permits(PAGES);
    assert!(rig.runtime.block_on(async { timeout(PATIENCE, prefetch.finished()).await }).expect("it hangs"));
    assert!(rig.vmm.dump(0, SIZE) == bytes);
    let metrics = rig.metrics();
    assert_eq!((metrics.prefetched, metrics.faults_storage), (PAGES as u64 - 1, 1));
    rig.finish();
}

#[test]
fn a_prefetch_that_fails_harms_nobody() {
    let bytes = content(SIZE);
    let storage = Storage::new(bytes.clone(), PAGE, |page, attempt| match (page % 3, attempt) {
        (0, 1) => Does::Fail,
        (1, 1) => Does::Short,
        _ => Does::Answer,
    });
    let mut rig = Rig::new(PLAIN, storage, Config::default());
    assert!(wait(&rig, &all_pages()));
    assert_eq!(rig.metrics().prefetched, (PAGES as u64) / 3);
    assert!(rig.vmm.dump(0, SIZE) == bytes);
    rig.finish();
}

#[test]
fn a_prefetch_ends_with_its_handler() {
    let storage = Storage::new(content(SIZE), PAGE, |_, _| Does::Stall);
    let mut rig = Rig::new(PLAIN, storage, Config::default());
    let mut prefetch = rig.handler().prefetch(&all_pages()).unwrap();
    rig.vmm.process.kill().unwrap();
    assert!(!rig.runtime.block_on(async { timeout(PATIENCE, prefetch.finished()).await }).expect("it hangs"));
}
