//! Headers of artifacts from arbitrary bytes, of any version: what is accepted must map the whole device,
//! once, and be read again as it is from what is written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lz4_flex::frame::FrameEncoder;
use nidus_block::header::{Header, Version};
use std::io::Write;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // A fuzzer makes no LZ4 frames with right checksums: what follows the fixed part, packed.
    let Some((fixed, block)) = bytes.split_at_checked(64) else { return };
    let mut encoder = FrameEncoder::new([fixed, &[0], &(block.len() as u32).to_le_bytes()].concat());
    encoder.write_all(block).expect("memory can be written");
    check(&encoder.finish().expect("memory can be written"));
});

fn check(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes) else { return };
    let mut at = 0;
    for extent in header.extents(0..u64::MAX) {
        assert_eq!(extent.offset, at);
        at += extent.len;
    }
    assert_eq!(at, header.size());
    let again = Header::parse(&header.encode(Version::V4).expect("it was read")).expect("what was written is valid");
    assert_eq!(again, header);
    assert_eq!(Header::parse(&header.to_bytes()).expect("what was written is valid").mappings(), header.mappings());
    // Zeros are joined there, and what lies beyond the device is left out.
    let Ok(columns) = header.encode(Version::V5) else { return };
    let columns = Header::parse(&columns).expect("what was written is valid");
    let stored = |h: &Header| h.extents(0..u64::MAX).filter(|m| !m.build.is_nil()).collect::<Vec<_>>();
    assert_eq!(stored(&columns), stored(&header));
    assert_eq!(columns.stored_builds(), header.stored_builds());
}
