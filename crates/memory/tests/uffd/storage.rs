//! Storage that fails, stalls or returns too little: the VM goes on with the right bytes, or the
//! handler ends with an error that says where and why.

use std::time::Duration;

use nidus_memory::uffd::{Config, HandlerError, SourceError};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::rig::{Does, PAGE, PLAIN, Rig, Storage, content};

const PAGES: usize = 512;
const SIZE: usize = PAGES * PAGE;

/// Does not wait long, so that the tests do not either.
fn config() -> Config {
    Config {
        attempts: 4,
        attempt_limit: Duration::from_millis(50),
        first_pause: Duration::from_millis(1),
        ..Config::default()
    }
}

/// One read in a hundred goes wrong, at least once for each kind.
fn unreliable(does: Does) -> impl Fn(usize, u32) -> Does + Send + Sync {
    move |page, attempt| {
        let unlucky = SmallRng::seed_from_u64((page * 16 + attempt as usize) as u64).random_bool(0.01);
        if unlucky || (page == 77 && attempt < 3) { does } else { Does::Answer }
    }
}

#[test]
fn what_goes_wrong_now_and_then_is_tried_again() {
    let bytes = content(SIZE);
    for (does, readers) in [(Does::Fail, 1), (Does::Short, 2), (Does::Stall, 1)] {
        let storage = Storage::new(bytes.clone(), PAGE, unreliable(does));
        let mut rig = Rig::new(PLAIN, storage.clone(), Config { readers, ..config() });
        rig.vmm.call(&format!("touch 0 {SIZE} 4"));
        assert!(rig.vmm.dump(0, SIZE) == bytes);
        let metrics = rig.metrics();
        assert_eq!(metrics.faults_storage, PAGES as u64);
        assert!(metrics.fetch_errors >= 2);
        assert_eq!(storage.attempts(77), 3);
        rig.finish();
    }
}

#[test]
fn what_stays_wrong_ends_the_handler_and_never_gives_a_byte() {
    type Check = fn(&SourceError) -> bool;
    let cases: [(Does, u32, Check); 4] = [
        (Does::Fail, 4, |cause| matches!(cause, SourceError::Read(_))),
        (Does::FailForGood, 1, |cause| matches!(cause, SourceError::Permanent(_))),
        (Does::Short, 4, |cause| matches!(cause, SourceError::Short { got: 2048, wanted: PAGE })),
        (Does::Stall, 4, |cause| matches!(cause, SourceError::Stalled(_))),
    ];
    for (does, expected, is_cause) in cases {
        let storage =
            Storage::new(content(SIZE), PAGE, move |page, _| if page == 100 { does } else { Does::Answer });
        let mut rig = Rig::new(PLAIN, storage, config());
        rig.vmm.send(&format!("touch 0 {SIZE} 2"));
        let error = rig.ended().unwrap_err();
        let HandlerError::Source { offset, attempts, cause, .. } = &*error else { panic!("{error}") };
        assert_eq!((*offset, *attempts), (100 * PAGE as u64, expected));
        assert!(is_cause(cause), "{error}");
        assert!(error.to_string().contains("0x64000"), "{error}");
        // The thread that touched it still waits: the command never ends, by this or that.
        rig.vmm.process.kill().unwrap();
        assert_eq!(rig.vmm.reply(), None);
        let handler = rig.handler.take().unwrap();
        assert!(rig.runtime.block_on(handler.stop()).is_err());
    }
}

#[test]
fn a_page_that_waits_for_storage_holds_up_no_other() {
    let bytes = content(SIZE);
    let storage =
        Storage::new(bytes.clone(), PAGE, |page, _| if page == 0 { Does::Wait } else { Does::Answer });
    let config = Config { fetches: 2, ..Config::default() };
    let mut rig = Rig::new(PLAIN, storage.clone(), config);
    rig.vmm.send("touch 0 4096 1");
    rig.until(|metrics| metrics.faults_missed == 1);
    let mut other = Rig::new(PLAIN, storage.clone(), Config::default());
    other.vmm.call(&format!("touch {PAGE} {} 2", SIZE - PAGE));
    assert!(other.vmm.dump(PAGE, SIZE - PAGE) == bytes[PAGE..]);
    other.finish();
    storage.release.add_permits(1);
    rig.vmm.reply().unwrap();
    assert!(rig.vmm.dump(0, SIZE) == bytes);
    rig.finish();
}

#[test]
fn a_fault_waits_no_longer_than_its_deadline() {
    let storage = Storage::new(content(SIZE), PAGE, |_, _| Does::Stall);
    // More faults than fetches: those in the queue have the same deadline.
    let config = Config {
        fetches: 1,
        fault_deadline: Duration::from_millis(100),
        attempt_limit: Duration::from_secs(3600),
        ..Config::default()
    };
    let mut rig = Rig::new(PLAIN, storage, config);
    rig.vmm.send(&format!("touch 0 {SIZE} 3"));
    let error = rig.ended().unwrap_err();
    assert!(matches!(&*error, HandlerError::Source { cause: SourceError::Stalled(_), .. }), "{error}");
}

#[test]
fn a_source_that_panics_ends_the_handler() {
    let storage =
        Storage::new(content(SIZE), PAGE, |page, _| if page == 3 { Does::Panic } else { Does::Answer });
    let mut rig = Rig::new(PLAIN, storage, config());
    rig.vmm.send(&format!("touch 0 {SIZE} 1"));
    let error = rig.ended().unwrap_err();
    assert!(matches!(&*error, HandlerError::BrokenOff { offset: 0x3000 }), "{error}");
}

#[test]
fn a_page_given_up_while_storage_fails_is_zero() {
    let storage = Storage::new(content(SIZE), PAGE, |page, attempt| match (page, attempt) {
        (0, 1) => Does::Wait,
        (0, _) => Does::FailForGood,
        _ => Does::Answer,
    });
    let mut rig =
        Rig::new(PLAIN, storage.clone(), Config { attempt_limit: Duration::from_secs(3600), ..config() });
    // One thread waits for page 0 while the other gives it up and reads it again.
    rig.vmm.send("race 0 1");
    assert_eq!(rig.vmm.reply(), Some(0));
    rig.finish();
}
