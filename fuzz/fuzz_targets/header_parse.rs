//! Headers of artifacts from arbitrary bytes: what is accepted must map the whole device, once.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_block::header::Header;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(bytes) else { return };
    let mut at = 0;
    for extent in header.extents(0..u64::MAX) {
        assert_eq!(extent.offset, at);
        at += extent.len;
    }
    assert_eq!(at, header.size());
    let again = Header::parse(&header.to_bytes()).expect("what was written is valid");
    assert_eq!(again, header);
});
