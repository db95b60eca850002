//! Any text as a Dockerfile.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = nidus_build::Dockerfile::parse(text, &Default::default());
    }
});
