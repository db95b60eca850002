//! A guest's records to the server of its volumes: calls and the arguments of all procedures.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|record: &[u8]| nidus_nfs::parse_anything(record));
