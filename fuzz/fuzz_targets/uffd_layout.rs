//! A VMM's description of its memory from arbitrary bytes: what is accepted must have one page at
//! each address, and one address for each page, within the memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nidus_memory::uffd::{Layout, MAX_REGIONS};

const MEMORY: u64 = 1 << 30;

fuzz_target!(|bytes: &[u8]| {
    let Ok(layout) = Layout::parse(bytes, MEMORY) else { return };
    assert!((1..=MAX_REGIONS).contains(&layout.regions().len()));
    let page = layout.page_size().bytes();
    let mut covered = 0;
    for region in layout.regions() {
        covered += region.size;
        assert!(region.offset + region.size <= MEMORY);
        for address in [region.base, region.base + region.size - 1] {
            let number = layout.page_at(address).expect("an address within a region");
            assert!(number < layout.pages());
            assert_eq!(layout.address_of(number), Some(address / page * page));
        }
    }
    assert!(covered <= MEMORY);
});
