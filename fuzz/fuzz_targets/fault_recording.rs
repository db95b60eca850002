//! Fault recordings from arbitrary bytes: what is accepted is within the memory, and can be written
//! and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_memory::uffd::{MAX_RECORDED, Recording};

fuzz_target!(|bytes: &[u8]| {
    let Ok(recording) = Recording::parse(bytes) else { return };
    assert!(recording.pages().len() <= MAX_RECORDED);
    let count = recording.memory_size() / recording.page_size().bytes();
    assert!(recording.pages().iter().all(|recorded| u64::from(recorded.page) < count));
    assert_eq!(Recording::parse(&recording.to_bytes()), Ok(recording));
});
