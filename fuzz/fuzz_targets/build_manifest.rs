//! Manifests of builds from arbitrary bytes: what is accepted names each frame once, within its object.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_storage::remote::Manifest;

fuzz_target!(|body: &[u8]| {
    let _ = Manifest::parse(body);
    // With a right checksum, or nothing would get past it.
    let mut bytes = [&b"NIDUSMAN"[..], &1u32.to_le_bytes(), body].concat();
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    let Ok(manifest) = Manifest::parse(&bytes) else { return };
    assert_eq!(manifest.to_bytes(), bytes);
    for (_, map) in manifest.artifacts() {
        for frame in map.frames() {
            let (found, object) = map.locate(frame.number).expect("it is in the map");
            assert_eq!(found, frame);
            assert!(frame.offset + frame.len <= object.len && map.content_len(frame.number) > 0);
        }
    }
});
