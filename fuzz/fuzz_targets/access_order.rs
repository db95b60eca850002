//! Recorded access orders from arbitrary bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_storage::remote::AccessOrder;

fuzz_target!(|body: &[u8]| {
    let _ = AccessOrder::parse(body);
    // With a right checksum, or nothing would get past it.
    let mut bytes = [&b"NIDUSORD"[..], body].concat();
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    let Ok(order) = AccessOrder::parse(&bytes) else { return };
    assert_eq!(order.to_bytes(), bytes);
});
