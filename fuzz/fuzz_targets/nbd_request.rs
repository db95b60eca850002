//! The plain functions of the NBD protocol on arbitrary bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_block::nbd::wire::{Action, MAX_PAYLOAD, REQUEST_LEN, Request, parse_info_request};

fuzz_target!(|input: (u64, bool, &[u8])| {
    let (size, structured, bytes) = input;
    let _ = parse_info_request(bytes);
    let Some(Some(request)) = bytes.first_chunk::<REQUEST_LEN>().map(Request::parse) else { return };
    match request.action(size, structured) {
        Ok(Action::Flush | Action::Disconnect) | Err(_) => {}
        Ok(action) => {
            assert!(u128::from(request.offset) + u128::from(request.len) <= u128::from(size));
            let carries = matches!(action, Action::Read | Action::Write { .. });
            assert!(!carries || request.len <= MAX_PAYLOAD);
        }
    }
});
