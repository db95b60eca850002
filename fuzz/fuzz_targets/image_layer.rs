//! Any bytes as a layer of an image: refused, or applied within the limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_oci::{Limits, read_layer};

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    if let Ok(dir) = tempfile::tempdir() {
        let limits = Limits { bytes: 1 << 20, entries: 1000, layers: 1 };
        let _ = read_layer(&mut data, &dir.path().join("contents"), &limits);
    }
});
