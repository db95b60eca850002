//! The first bytes of a guest's flow, all at once and piece by piece.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_egress::{Sniffed, host_name, sniff};

fuzz_target!(|bytes: &[u8]| {
    let whole = sniff(bytes);
    if let Sniffed::Tls(Some(name)) | Sniffed::Http(Some(name)) = &whole {
        assert_eq!(host_name(name).as_ref(), Some(name));
    }
    // What was clear stays so when more comes.
    for n in 0..bytes.len() {
        let part = sniff(&bytes[..n]);
        if matches!(part, Sniffed::Tls(_) | Sniffed::Http(_)) {
            assert_eq!(part, whole);
            break;
        }
    }
});
