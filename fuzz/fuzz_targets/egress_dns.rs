//! A guest's question for a name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_egress::{datagram, parse_question, reply};

fuzz_target!(|bytes: &[u8]| {
    let Ok(asked) = parse_question(bytes) else { return };
    let answer = reply(&asked.message, Default::default());
    let wire = datagram(&asked.message, &answer).unwrap_or_default();
    assert!(wire.len() <= 4096);
});
