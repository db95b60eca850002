//! Faults of all kinds, from a source that has everything.

use nidus_memory::uffd::{Config, End, Handler, HandlerError, Process, StartError, Violation};

use crate::{
    child::{EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, userfaultfd},
    rig::{AtHand, Does, HUGE, HugePages, Map, PAGE, PLAIN, Rig, Storage, content, receive},
};

const SIZE: usize = 256 * PAGE;

fn config(readers: usize, around: usize) -> Config {
    Config { readers, around, ..Config::default() }
}

#[test]
fn each_page_has_its_content_whoever_touches_it_first() {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    // The first VM meets a file of which nothing is known, the others go to the mapping.
    for (readers, around, regions) in [(1, 1, 1), (1, 1, 3), (2, 1, 2), (1, 16, 3), (3, 8, 1)] {
        let mut rig = Rig::new(Map { regions, ..PLAIN }, source.clone(), config(readers, around));
        rig.vmm.call(&format!("touch 0 {SIZE} 4"));
        assert!(rig.vmm.dump(0, SIZE) == bytes);
        let metrics = rig.metrics();
        let zero = (0..SIZE / PAGE).filter(|page| page % 5 == 3).count() as u64;
        assert_eq!(metrics.faults_zero, zero);
        let brought = metrics.faults_cache + metrics.around;
        assert_eq!(brought, (SIZE / PAGE) as u64 - zero);
        assert_eq!(metrics.bytes_copied, brought * PAGE as u64);
        assert!(around == 1 || metrics.around > 0, "nothing was copied around: {metrics:?}");
        assert_eq!(metrics.faults_storage + metrics.removes + metrics.fetch_errors + metrics.faults_gone, 0);
        let touched = rig.touched();
        assert_eq!((touched.present.count(), touched.zeroed.count()), (SIZE / PAGE, 0));
        rig.finish();
    }
}

#[test]
fn what_was_never_touched_is_not_in_place() {
    let source = AtHand::new(&content(SIZE), PAGE);
    let mut rig = Rig::new(PLAIN, source, config(1, 1));
    rig.vmm.call(&format!("touch {} {} 1", 10 * PAGE, 3 * PAGE));
    rig.vmm.call(&format!("write {} 1 9", 40 * PAGE + 7));
    rig.vmm.call(&format!("remove {} {}", 11 * PAGE, PAGE));
    let touched = rig.touched();
    let page = PAGE as u64;
    let present = vec![10 * page..11 * page, 12 * page..13 * page, 40 * page..41 * page];
    assert_eq!(touched.present.byte_ranges(page), present);
    assert_eq!(touched.zeroed.byte_ranges(page), std::slice::from_ref(&(11 * page..12 * page)));
    rig.finish();
}

#[test]
fn huge_pages() {
    let Some(_allowed) = HugePages::allow(8) else { return };
    let mut bytes = content(4 * HUGE);
    bytes[HUGE..2 * HUGE].fill(0);
    let source = AtHand::new(&bytes, HUGE);
    let map = Map { page: HUGE, regions: 2, ..PLAIN };
    for readers in [1, 2] {
        let mut rig = Rig::new(map, source.clone(), config(readers, 16));
        rig.vmm.call(&format!("touch 0 {} 3", 4 * HUGE));
        assert!(rig.vmm.dump(0, 4 * HUGE) == bytes);
        // Part of a huge page is not given up.
        rig.vmm.call(&format!("remove {} {}", 3 * HUGE, HUGE));
        assert!(rig.vmm.dump(3 * HUGE, HUGE).iter().all(|byte| *byte == 0));
        let metrics = rig.metrics();
        assert_eq!((metrics.faults_cache, metrics.faults_zero, metrics.removed_pages), (3, 2, 1));
        rig.finish();
    }
}

#[test]
fn pages_that_were_given_up_are_zero_from_then_on() {
    let mut bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    let mut rig = Rig::new(Map { regions: 2, ..PLAIN }, source, config(1, 1));
    rig.vmm.call(&format!("touch 0 {} 2", SIZE / 2));
    // Touched and untouched ones, up to the end of the first region.
    for (first, count) in [(10, 7), (20, 100), (200, 3)] {
        rig.vmm.call(&format!("remove {} {}", first * PAGE, count * PAGE));
        bytes[first * PAGE..(first + count) * PAGE].fill(0);
    }
    rig.vmm.call(&format!("write {} 5 77", 21 * PAGE));
    bytes[21 * PAGE..21 * PAGE + 5].fill(77);
    assert!(rig.vmm.dump(0, SIZE) == bytes);
    let metrics = rig.metrics();
    assert_eq!((metrics.removes, metrics.removed_pages), (3, 110));
    rig.finish();
}

/// No old content may come after a page was given up, however the two meet.
#[test]
fn a_copy_never_outlives_a_removal() {
    // No page of zeros, which would hide a fault.
    let bytes = vec![0xa5; 4096 * PAGE];
    let source = AtHand::new(&bytes, PAGE);
    for readers in [1, 2] {
        let mut rig = Rig::new(PLAIN, source.clone(), config(readers, 1));
        assert_eq!(rig.vmm.call("race 0 4096"), 0);
        assert_eq!(rig.metrics().removes, 4096);
        rig.finish();
        let storage = Storage::new(bytes[..512 * PAGE].to_vec(), PAGE, |_, _| Does::Answer);
        let mut rig = Rig::new(PLAIN, storage, config(readers, 1));
        assert_eq!(rig.vmm.call("race 0 512"), 0);
        rig.finish();
    }
}

#[test]
fn faults_on_one_page_from_many_threads_are_one_copy() {
    let storage = Storage::new(content(SIZE), PAGE, |_, _| Does::Wait);
    let mut rig = Rig::new(PLAIN, storage.clone(), config(2, 1));
    rig.vmm.send(&format!("touch {PAGE} {PAGE} 8"));
    // All eight wait for it.
    rig.until(|metrics| metrics.faults_missed == 8);
    storage.release.add_permits(1);
    rig.vmm.reply().unwrap();
    let metrics = rig.metrics();
    assert_eq!((metrics.faults_storage, metrics.bytes_copied), (1, PAGE as u64));
    assert_eq!(storage.attempts(1), 1);
    rig.finish();
}

#[test]
fn memory_that_is_unregistered_ends_nothing() {
    let source = AtHand::new(&content(SIZE), PAGE);
    let mut rig = Rig::new(PLAIN, source, config(1, 1));
    rig.vmm.call(&format!("touch 0 {} 2", 8 * PAGE));
    rig.vmm.call("unregister");
    // The kernel answers from now on.
    assert!(rig.vmm.dump(8 * PAGE, PAGE).iter().all(|byte| *byte == 0));
    rig.finish();
}

#[test]
fn memory_that_is_unmapped_ends_nothing() {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    let map = Map { features: EVENT_REMOVE | EVENT_UNMAP, ..PLAIN };
    let mut rig = Rig::new(map, source, config(1, 1));
    rig.vmm.call(&format!("touch 0 {} 2", 8 * PAGE));
    rig.vmm.call(&format!("unmap {} {}", 4 * PAGE, 8 * PAGE));
    assert!(rig.vmm.dump(0, 4 * PAGE) == bytes[..4 * PAGE]);
    assert!(rig.vmm.dump(12 * PAGE, SIZE - 12 * PAGE) == bytes[12 * PAGE..]);
    assert_eq!(rig.touched().present.count(), SIZE / PAGE - 8);
    rig.finish();
}

#[test]
fn a_process_that_ends_while_a_page_is_fetched() {
    let storage = Storage::new(content(SIZE), PAGE, |_, _| Does::Wait);
    let mut rig = Rig::new(PLAIN, storage.clone(), config(1, 1));
    rig.vmm.send(&format!("touch {PAGE} {PAGE} 1"));
    rig.until(|metrics| metrics.faults_missed == 1);
    rig.vmm.process.kill().unwrap();
    assert_eq!(rig.ended().unwrap(), End::Exited);
    storage.release.add_permits(1);
    let handler = rig.handler.take().unwrap();
    assert_eq!(rig.runtime.block_on(handler.stop()).unwrap(), End::Exited);
}

#[test]
fn a_killed_process_ends_its_handler_and_no_other() {
    let bytes = content(SIZE);
    let source = AtHand::new(&bytes, PAGE);
    let mut killed = Rig::new(PLAIN, source.clone(), config(2, 1));
    let mut other = Rig::new(PLAIN, source, config(1, 1));
    killed.vmm.send(&format!("touch 0 {SIZE} 4"));
    killed.vmm.process.kill().unwrap();
    assert_eq!(killed.ended().unwrap(), End::Exited);
    assert!(other.vmm.dump(0, SIZE) == bytes);
    other.finish();
}

#[test]
fn stopping_leaves_no_thread_and_closes_the_descriptor_only_then() {
    let source = AtHand::new(&content(SIZE), PAGE);
    let mut rig = Rig::new(PLAIN, source, config(2, 1));
    rig.vmm.call(&format!("touch 0 {PAGE} 1"));
    let handler = rig.handler.take().unwrap();
    assert_eq!(rig.runtime.block_on(handler.stop()).unwrap(), End::Stopped);
}

#[test]
fn a_vmm_that_does_what_none_should_is_reported() {
    let source = AtHand::new(&content(SIZE), PAGE);
    let report = |features, commands: &[&str]| {
        let mut rig = Rig::new(Map { features, ..PLAIN }, source.clone(), config(1, 1));
        commands.iter().for_each(|command| rig.vmm.send(command));
        match &*rig.ended().unwrap_err() {
            HandlerError::Protocol(violation) => *violation,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(report(EVENT_REMOVE, &["stray"]), Violation::Stray { .. }));
    assert!(matches!(report(EVENT_REMOVE | EVENT_REMAP, &["move"]), Violation::Remap { .. }));
    assert_eq!(report(EVENT_REMOVE, &["blocking", "touch 0 4096 1"]), Violation::Blocking);
}

#[test]
fn a_connection_without_a_known_process_ends_when_it_is_closed() {
    use std::os::{fd::AsFd, unix::net::UnixStream};
    let source = AtHand::new(&content(SIZE), PAGE);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let message =
        format!(r#"[{{"base_host_virt_addr":{},"size":{SIZE},"offset":0,"page_size":4096}}]"#, 1u64 << 40);
    let connect = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let uffd = userfaultfd(EVENT_REMOVE);
        crate::child::send(&theirs, message.as_bytes(), &[uffd.as_fd()]);
        (receive(&runtime, ours, SIZE as u64).unwrap(), theirs)
    };
    let (handshake, theirs) = connect();
    assert!(handshake.process().is_none());
    let handler = {
        let _context = runtime.enter();
        Handler::start(handshake, source.clone(), config(1, 1)).unwrap()
    };
    drop(theirs);
    assert_eq!(runtime.block_on(handler.ended()).unwrap(), End::Disconnected);

    let (handshake, _theirs) = connect();
    let handshake = handshake.with_process(Process::of_pid(std::process::id()).unwrap());
    assert_eq!(handshake.process().unwrap().pid(), std::process::id());
    assert!(matches!(Handler::start(handshake, source, config(1, 1)), Err(StartError::NoRuntime)));
    let (handshake, _theirs) = connect();
    let other = Storage::new(content(PAGE), PAGE, |_, _| Does::Answer);
    let _context = runtime.enter();
    assert!(matches!(Handler::start(handshake, other, config(1, 1)), Err(StartError::Size { .. })));
}
