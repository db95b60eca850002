//! Live snapshots against a plain model of the memory.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, mpsc},
};

use nidus_memory::uffd::{Config, LiveSnapshot, PageSink, Saved, SnapshotError};
use proptest::prelude::*;

use crate::{
    child::{MISSING, WRITE_PROTECT, hammer_writes},
    rig::{AtHand, HUGE, HugePages, Map, PAGE, PLAIN, Rig, content},
};

const PAGES: usize = 96;
const SIZE: usize = PAGES * PAGE;

/// Keeps what it gets.
#[derive(Default, Clone)]
struct Kept(Arc<Mutex<BTreeMap<u64, Vec<u8>>>>);

impl PageSink for Kept {
    fn save(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let before = self.0.lock().unwrap().insert(offset, bytes.to_vec());
        assert!(before.is_none(), "offset {offset:#x} twice");
        Ok(())
    }
}

impl Kept {
    /// The memory that a snapshot stands for.
    fn memory(&self, source: &[u8], saved: &Saved, page: usize) -> Vec<u8> {
        let mut memory = source.to_vec();
        let mut covered = 0;
        for (offset, bytes) in self.0.lock().unwrap().iter() {
            let pages = *offset as usize / page..(*offset as usize + bytes.len()) / page;
            assert!(pages.clone().all(|page| saved.pages.contains(page)));
            covered += pages.len();
            memory[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        }
        assert_eq!(covered, saved.pages.count(), "each page once");
        for run in saved.zeroed.runs() {
            memory[run.start * page..run.end * page].fill(0);
        }
        memory
    }
}

/// A sink that takes nothing before it is told to.
struct Held(Kept, mpsc::Receiver<()>);

impl PageSink for Held {
    fn save(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // The test drops its end to let all through.
        let _ = self.1.recv();
        self.0.save(offset, bytes)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { page: usize, within: usize, value: u8 },
    Touch { page: usize, count: usize },
    Remove { page: usize, count: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..PAGES, 0..PAGE, any::<u8>()).prop_map(|(page, within, value)| Step::Write {
            page,
            within,
            value
        }),
        (0..PAGES, 1..20usize).prop_map(|(page, count)| Step::Touch { page, count: count.min(PAGES - page) }),
        (0..PAGES, 1..9usize).prop_map(|(page, count)| Step::Remove { page, count: count.min(PAGES - page) }),
    ];
    prop::collection::vec(step, 0..30)
}

fn perform(rig: &mut Rig, model: &mut [u8], steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Write { page, within, value } => {
                model[page * PAGE + within] = value;
                rig.vmm.call(&format!("write {} 1 {value}", page * PAGE + within));
            }
            Step::Touch { page, count } => {
                rig.vmm.call(&format!("touch {} {} 1", page * PAGE, count * PAGE));
            }
            Step::Remove { page, count } => {
                model[page * PAGE..(page + count) * PAGE].fill(0);
                rig.vmm.call(&format!("remove {} {}", page * PAGE, count * PAGE));
            }
        }
    }
}

fn hammer(rig: &mut Rig, model: &mut [u8], page: usize, seed: u64) {
    let pages = model.len() / page;
    for thread in 0..2 {
        for (number, within, value) in hammer_writes(seed, thread, 2, pages, 300) {
            model[number * page + within] = value;
        }
    }
    rig.vmm.send(&format!("hammer {seed} 2 {pages} 300"));
}

fn begin(rig: &Rig, sink: impl PageSink) -> Result<LiveSnapshot, SnapshotError> {
    rig.runtime.block_on(rig.handler().live_snapshot(Box::new(sink)))
}

fn source() -> (Vec<u8>, Arc<AtHand>) {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    (bytes, source)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever happened before, and whatever the VM writes meanwhile: the snapshot is the memory
    /// of the instant at which it began, and the VM sees nothing of it.
    #[test]
    fn a_snapshot_is_the_memory_of_one_instant(
        steps in steps(), more in steps(), seed in any::<u32>(), readers in 1..3usize, registered in any::<bool>()
    ) {
        let (bytes, source) = source();
        // Registered for write-protection, or as Firecracker does: then the handler extends it.
        let mode = if registered { MISSING | WRITE_PROTECT } else { MISSING };
        let map = Map { mode, regions: 2, ..PLAIN };
        let mut rig = Rig::new(map, source, Config { readers, ..Config::default() });
        let mut model = bytes.clone();
        for (round, steps) in [steps, more].into_iter().enumerate() {
            perform(&mut rig, &mut model, &steps);
            let instant = model.clone();
            let kept = Kept::default();
            let live = begin(&rig, kept.clone()).unwrap();
            hammer(&mut rig, &mut model, PAGE, u64::from(seed) + round as u64 * 1000);
            let saved = rig.runtime.block_on(live.finish()).unwrap();
            rig.vmm.reply().unwrap();
            prop_assert!(kept.memory(&bytes, &saved, PAGE) == instant);
        }
        prop_assert!(rig.vmm.dump(0, SIZE) == model);
        rig.finish();
    }
}

#[test]
fn pages_are_saved_before_the_vm_writes_to_them() {
    let (bytes, source) = source();
    let mut rig = Rig::new(PLAIN, source, Config::default());
    let mut model = bytes.clone();
    hammer(&mut rig, &mut model, PAGE, 5);
    rig.vmm.reply().unwrap();
    rig.vmm.call(&format!("touch 0 {SIZE} 1"));
    let (let_go, wait) = mpsc::channel();
    let kept = Kept::default();
    let live = begin(&rig, Held(kept.clone(), wait)).unwrap();
    assert!(matches!(begin(&rig, Kept::default()), Err(SnapshotError::Busy)));
    let instant = model.clone();
    // The sink takes nothing yet, and the VM writes all the same.
    hammer(&mut rig, &mut model, PAGE, 6);
    rig.vmm.reply().unwrap();
    assert!(rig.vmm.dump(0, SIZE) == model);
    drop(let_go);
    let saved = rig.runtime.block_on(live.finish()).unwrap();
    assert_eq!(saved.pages.count(), PAGES);
    assert!(kept.memory(&bytes, &saved, PAGE) == instant);
    let metrics = rig.metrics();
    assert_eq!(metrics.saved_on_write + metrics.saved_by_sweep, PAGES as u64);
    rig.finish();
}

#[test]
fn huge_pages() {
    let Some(_allowed) = HugePages::allow(8) else { return };
    let bytes = content(4 * HUGE);
    let source = AtHand::new(&bytes, HUGE);
    let mut rig = Rig::new(Map { page: HUGE, ..PLAIN }, source, Config::default());
    let mut model = bytes.clone();
    rig.vmm.call(&format!("write {} 1 3", HUGE + 9));
    model[HUGE + 9] = 3;
    rig.vmm.call(&format!("touch {} {HUGE} 1", 2 * HUGE));
    let instant = model.clone();
    let kept = Kept::default();
    let live = begin(&rig, kept.clone()).unwrap();
    hammer(&mut rig, &mut model, HUGE, 8);
    let saved = rig.runtime.block_on(live.finish()).unwrap();
    rig.vmm.reply().unwrap();
    assert_eq!(saved.pages.runs().collect::<Vec<_>>(), std::slice::from_ref(&(1..3)));
    assert!(kept.memory(&bytes, &saved, HUGE) == instant);
    assert!(rig.vmm.dump(0, 4 * HUGE) == model);
    rig.finish();
}

#[test]
fn a_snapshot_that_fails_lets_the_vm_go_on() {
    struct Full;
    impl PageSink for Full {
        fn save(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
            Err(io::Error::other("no space"))
        }
    }
    let (bytes, source) = source();
    let mut rig = Rig::new(PLAIN, source, Config::default());
    let mut model = bytes.clone();
    rig.vmm.call(&format!("touch 0 {SIZE} 1"));
    let live = begin(&rig, Full).unwrap();
    let error = rig.runtime.block_on(live.finish()).unwrap_err();
    assert!(matches!(error, SnapshotError::Sink { .. }), "{error}");
    hammer(&mut rig, &mut model, PAGE, 6);
    rig.vmm.reply().unwrap();
    // Dropped, with the VM in the midst of its writes.
    let (let_go, wait) = mpsc::channel();
    let live = begin(&rig, Held(Kept::default(), wait)).unwrap();
    hammer(&mut rig, &mut model, PAGE, 7);
    drop(live);
    rig.vmm.reply().unwrap();
    drop(let_go);
    assert!(rig.vmm.dump(0, SIZE) == model);
    rig.finish();
}

/// The balloon gives up a page that was not saved: its content of that instant is lost, and the
/// snapshot says so instead of having zeros.
#[test]
fn a_page_given_up_too_early_fails_the_snapshot() {
    const MORE: usize = 20_000 * PAGE;
    let source = AtHand::new(&content(MORE), PAGE);
    let mut rig = Rig::new(PLAIN, source, Config::default());
    rig.vmm.call(&format!("touch 0 {MORE} 1"));
    let (let_go, wait) = mpsc::channel();
    // The sweep stops half way, because the sink takes nothing.
    let live = begin(&rig, Held(Kept::default(), wait)).unwrap();
    rig.until(|metrics| metrics.saved_by_sweep * PAGE as u64 >= 32 << 20);
    let last = MORE - PAGE;
    rig.vmm.call(&format!("remove {last} {PAGE}"));
    drop(let_go);
    let error = rig.runtime.block_on(live.finish()).unwrap_err();
    assert!(matches!(error, SnapshotError::Removed { offset } if offset == last as u64), "{error}");
    rig.vmm.call(&format!("write 0 {PAGE} 1"));
    assert!(rig.vmm.dump(last, PAGE).iter().all(|byte| *byte == 0));
    rig.finish();
}

#[test]
fn a_snapshot_ends_with_the_vm() {
    let (_bytes, source) = source();
    let mut rig = Rig::new(PLAIN, source, Config::default());
    rig.vmm.call(&format!("touch 0 {SIZE} 1"));
    let (let_go, wait) = mpsc::channel();
    let live = begin(&rig, Held(Kept::default(), wait)).unwrap();
    rig.vmm.process.kill().unwrap();
    rig.ended().unwrap();
    drop(let_go);
    // It may have read all before.
    match rig.runtime.block_on(live.finish()) {
        Ok(saved) => assert_eq!(saved.pages.count(), PAGES),
        Err(error) => assert!(matches!(error, SnapshotError::Ended | SnapshotError::Read { .. }), "{error}"),
    }
    assert!(matches!(begin(&rig, Kept::default()), Err(SnapshotError::Ended | SnapshotError::System { .. })));
}
