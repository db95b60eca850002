//! Where the guest's memory lies in the VMM, as the VMM tells it.

use std::ops::Range;

use serde::Deserialize;

use crate::PageSize;

/// The longest message with regions that is read, in bytes.
pub const MAX_MESSAGE: usize = 16 << 10;
/// The most regions that a VMM may have.
pub const MAX_REGIONS: usize = 64;
/// The end of the addresses that a process can have on x86-64 (five-level page tables).
const ADDRESS_END: u64 = 1 << 56;

/// Why a VMM's description of its memory is refused.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// It is not the JSON array that is expected.
    #[error("the VMM's description of its memory is not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// There are none, or too many.
    #[error("the VMM describes {count} memory regions; 1 to {MAX_REGIONS} are accepted")]
    Count {
        /// How many there are.
        count: usize,
    },
    /// A page size that is not supported, contradictory or not the same in all regions.
    #[error(
        "region {region} of the VMM's memory has page size {page_size}: all must have 4096 or all 2097152"
    )]
    PageSize {
        /// The place of the region in the message, from 0.
        region: usize,
        /// The page size as it was given, 0 if there was none.
        page_size: u64,
    },
    /// A region is empty, does not consist of whole pages or goes beyond what can be addressed.
    #[error(
        "region {region} of the VMM's memory (address {base:#x}, {size} bytes, offset {offset:#x}) does not consist of whole pages within the address space"
    )]
    Misaligned {
        /// The place of the region in the message, from 0.
        region: usize,
        /// Its address in the VMM.
        base: u64,
        /// Its size in bytes.
        size: u64,
        /// Its offset in the memory file.
        offset: u64,
    },
    /// A region ends beyond the end of the memory file.
    #[error(
        "region {region} of the VMM's memory ends at offset {end:#x}, the memory has {memory_size:#x} bytes"
    )]
    Outside {
        /// The place of the region in the message, from 0.
        region: usize,
        /// The offset of its end.
        end: u64,
        /// The size of the memory in bytes.
        memory_size: u64,
    },
    /// Two regions have addresses or offsets in common.
    #[error("two regions of the VMM's memory overlap at {what} {at:#x}")]
    Overlap {
        /// "address" or "offset".
        what: &'static str,
        /// Where the second of them begins.
        at: u64,
    },
}

impl LayoutError {
    /// Whether the message may become right when more of it arrives.
    pub(super) fn is_incomplete(&self) -> bool {
        matches!(self, Self::Json(error) if error.is_eof())
    }
}

/// A contiguous piece of the guest's memory in the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first address in the VMM.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where its content begins in the memory file, in bytes.
    pub offset: u64,
}

/// A region as Firecracker writes it.
#[derive(Deserialize)]
struct RawRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

impl RawRegion {
    /// The page size. `page_size_kib` is, in spite of its name, in bytes where Firecracker writes
    /// it; KiB are understood too.
    fn page_size(&self) -> Result<PageSize, u64> {
        let known = |bytes| match bytes {
            0x1000 => Ok(PageSize::Small),
            0x20_0000 => Ok(PageSize::Huge),
            other => Err(other),
        };
        let old =
            self.page_size_kib.map(|size| known(if matches!(size, 4 | 2048) { size << 10 } else { size }));
        let new = self.page_size.map(known);
        match (new, old) {
            (Some(Ok(new)), Some(Ok(old))) if new != old => Err(old.bytes()),
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => Err(0),
        }
    }
}

/// The guest's memory in the VMM: checked regions that are apart, each of whole pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Ascending by address.
    regions: Vec<Region>,
    page_size: PageSize,
    memory_size: u64,
}

impl Layout {
    /// Reads and checks Firecracker's message: a JSON array of
    /// `{"base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"}`, all numbers in
    /// bytes, for a memory of `memory_size` bytes. The sender is not trusted.
    pub fn parse(message: &[u8], memory_size: u64) -> Result<Self, LayoutError> {
        let raw: Vec<RawRegion> = serde_json::from_slice(message)?;
        let count = raw.len();
        let Some(first) = raw.first().filter(|_| count <= MAX_REGIONS) else {
            return Err(LayoutError::Count { count });
        };
        let page_size =
            first.page_size().map_err(|page_size| LayoutError::PageSize { region: 0, page_size })?;
        let mut regions = Vec::with_capacity(count);
        for (region, raw) in raw.iter().enumerate() {
            match raw.page_size() {
                Ok(size) if size == page_size => {}
                Ok(size) => return Err(LayoutError::PageSize { region, page_size: size.bytes() }),
                Err(page_size) => return Err(LayoutError::PageSize { region, page_size }),
            }
            let (base, size, offset) = (raw.base_host_virt_addr, raw.size, raw.offset);
            let page = page_size.bytes();
            let ends = base.checked_add(size).filter(|end| *end <= ADDRESS_END).zip(offset.checked_add(size));
            let whole = [base, size, offset].iter().all(|number| number.is_multiple_of(page));
            let Some((_, end)) = ends.filter(|_| whole && size > 0 && base > 0) else {
                return Err(LayoutError::Misaligned { region, base, size, offset });
            };
            if end > memory_size {
                return Err(LayoutError::Outside { region, end, memory_size });
            }
            regions.push(Region { base, size, offset });
        }
        let overlap = |regions: &[Region], start: fn(&Region) -> u64| {
            let mut pairs = regions.windows(2);
            pairs.find(|pair| start(&pair[0]) + pair[0].size > start(&pair[1])).map(|pair| start(&pair[1]))
        };
        regions.sort_unstable_by_key(|region| region.offset);
        if let Some(at) = overlap(&regions, |region| region.offset) {
            return Err(LayoutError::Overlap { what: "offset", at });
        }
        regions.sort_unstable_by_key(|region| region.base);
        if let Some(at) = overlap(&regions, |region| region.base) {
            return Err(LayoutError::Overlap { what: "address", at });
        }
        Ok(Self { regions, page_size, memory_size })
    }

    /// The regions, ascending by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The page size of all regions.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The size of the memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory_size
    }

    /// How many pages the memory has, counting those in no region.
    pub fn pages(&self) -> usize {
        (self.memory_size / self.page_size.bytes()) as usize
    }

    /// The page at an address of the VMM; `None` outside of the regions.
    pub fn page_at(&self, address: u64) -> Option<usize> {
        let after = self.regions.partition_point(|region| region.base <= address);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let within = address - region.base;
        (within < region.size).then(|| ((region.offset + within) / self.page_size.bytes()) as usize)
    }

    fn region_of(&self, page: usize) -> Option<&Region> {
        let offset = page as u64 * self.page_size.bytes();
        self.regions.iter().find(|region| (region.offset..region.offset + region.size).contains(&offset))
    }

    /// The address of a page in the VMM; `None` for a page in no region.
    pub fn address_of(&self, page: usize) -> Option<u64> {
        let region = self.region_of(page)?;
        Some(region.base + (page as u64 * self.page_size.bytes() - region.offset))
    }

    /// All pages of the region in which this page is.
    pub(super) fn neighbours(&self, page: usize) -> Option<Range<usize>> {
        self.region_of(page).map(|region| self.pages_of(region, region.base..region.base + region.size))
    }

    /// The pages, in runs, that lie wholly within a range of addresses.
    pub(super) fn pages_within(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<usize>> + '_ {
        self.regions.iter().map(move |region| self.pages_of(region, addresses.clone()))
    }

    fn pages_of(&self, region: &Region, addresses: Range<u64>) -> Range<usize> {
        let page = self.page_size.bytes();
        let start = addresses.start.clamp(region.base, region.base + region.size) - region.base;
        let end = addresses.end.clamp(region.base, region.base + region.size) - region.base;
        let first = (region.offset + start).div_ceil(page);
        let last = (region.offset + end) / page;
        first as usize..(last.max(first)) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(base: u64, size: u64, offset: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":4096,"page_size_kib":4096}}"#
        )
    }

    fn parse(regions: &[String], memory_size: u64) -> Result<Layout, LayoutError> {
        Layout::parse(format!("[{}]", regions.join(",")).as_bytes(), memory_size)
    }

    #[test]
    fn two_regions_with_a_hole_between_them() {
        let layout = parse(&[region(0x9000, 0x2000, 0x3000), region(0x1000, 0x3000, 0)], 0x8000).unwrap();
        assert_eq!(layout.pages(), 8);
        assert_eq!(layout.page_at(0xfff), None);
        assert_eq!(layout.page_at(0x1000), Some(0));
        assert_eq!(layout.page_at(0x3fff), Some(2));
        assert_eq!(layout.page_at(0x4000), None);
        assert_eq!(layout.page_at(0xafff), Some(4));
        assert_eq!(layout.page_at(0xb000), None);
        assert_eq!(layout.page_at(u64::MAX), None);
        assert_eq!(layout.address_of(3), Some(0x9000));
        assert_eq!(layout.address_of(5), None);
        assert_eq!(layout.neighbours(4), Some(3..5));
        let within = |range| layout.pages_within(range).filter(|run| !run.is_empty()).collect::<Vec<_>>();
        assert_eq!(within(0..u64::MAX), [0..3, 3..5]);
        assert_eq!(within(0x1001..0x3fff), std::slice::from_ref(&(1..2)));
        assert_eq!(within(0x1001..0x1fff), [0..0; 0]);
    }

    #[test]
    fn page_sizes_of_all_versions() {
        let with = |fields: &str| {
            let text = format!(r#"[{{"base_host_virt_addr":2097152,"size":2097152,"offset":0{fields}}}]"#);
            Layout::parse(text.as_bytes(), 2 << 20).map(|layout| layout.page_size())
        };
        assert_eq!(with(r#","page_size":4096"#).unwrap(), PageSize::Small);
        assert_eq!(with(r#","page_size_kib":2097152"#).unwrap(), PageSize::Huge);
        assert_eq!(with(r#","page_size_kib":2048,"later":[1]"#).unwrap(), PageSize::Huge);
        assert_eq!(with(r#","page_size_kib":4,"page_size":4096"#).unwrap(), PageSize::Small);
        for wrong in [
            "",
            r#","page_size":0"#,
            r#","page_size":8192"#,
            r#","page_size":4096,"page_size_kib":2048"#,
            r#","page_size":1073741824"#,
        ] {
            assert!(matches!(with(wrong), Err(LayoutError::PageSize { .. })), "{wrong}");
        }
        let regions = [region(0x20_0000, 0x20_0000, 0), region(0x40_0000, 0x20_0000, 0x20_0000)];
        let small = r#""page_size":4096,"page_size_kib":4096"#;
        let mixed = format!("[{}]", regions.join(",")).replacen(small, r#""page_size":2097152"#, 1);
        assert!(matches!(Layout::parse(mixed.as_bytes(), 1 << 30), Err(LayoutError::PageSize { .. })));
    }

    #[test]
    fn what_is_refused() {
        let one = |base, size, offset| parse(&[region(base, size, offset)], 0x10000);
        for (base, size, offset) in [
            (0x1001, 0x1000, 0),
            (0x1000, 0x1001, 0),
            (0x1000, 0x1000, 1),
            (0x1000, 0, 0),
            (0, 0x1000, 0),
            (u64::MAX - 0xfff, 0x1000, 0),
            (1 << 56, 0x1000, 0),
            (0x1000, 0x1000, u64::MAX - 0xfff),
        ] {
            assert!(matches!(one(base, size, offset), Err(LayoutError::Misaligned { .. })), "{base:#x}");
        }
        assert!(matches!(one(0x1000, 0x11000, 0), Err(LayoutError::Outside { .. })));
        assert!(matches!(one(0x1000, 0x1000, 0x10000), Err(LayoutError::Outside { .. })));
        let overlap = parse(&[region(0x1000, 0x2000, 0), region(0x2000, 0x1000, 0x2000)], 0x10000);
        assert!(matches!(overlap, Err(LayoutError::Overlap { what: "address", at: 0x2000 })));
        let overlap = parse(&[region(0x1000, 0x2000, 0), region(0x9000, 0x1000, 0x1000)], 0x10000);
        assert!(matches!(overlap, Err(LayoutError::Overlap { what: "offset", at: 0x1000 })));
        assert!(matches!(parse(&[], 0x10000), Err(LayoutError::Count { count: 0 })));
        let many: Vec<_> = (0..65).map(|i| region((i + 1) << 12, 0x1000, i << 12)).collect();
        assert!(matches!(parse(&many, 1 << 20), Err(LayoutError::Count { count: 65 })));
        assert_eq!(parse(&many[..64], 1 << 20).unwrap().regions().len(), 64);
        for text in ["", "[", "[{", "{}", "[1]", "[] x", r#"[{"size":-1}]"#, "\u{0}"] {
            let error = Layout::parse(text.as_bytes(), 4096).unwrap_err();
            assert!(matches!(error, LayoutError::Json(_)), "{text}");
            assert_eq!(error.is_incomplete(), matches!(text, "" | "[" | "[{"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Layout::parse(&bytes, 1 << 20);
        }

        /// Whatever is accepted maps each address to one page and back.
        #[test]
        fn accepted_layouts_are_consistent(
            raw in prop::collection::vec((0..40u64, 0..8u64, 0..40u64), 1..5)
        ) {
            let text: Vec<_> = raw.iter().map(|(b, s, o)| region(b << 12, s << 12, o << 12)).collect();
            if let Ok(layout) = parse(&text, 32 << 12) {
                let mut seen = std::collections::BTreeSet::new();
                for address in (0..64u64).map(|page| page << 12) {
                    if let Some(page) = layout.page_at(address) {
                        prop_assert!(page < layout.pages());
                        prop_assert!(seen.insert(page));
                        prop_assert_eq!(layout.address_of(page), Some(address));
                    }
                }
                prop_assert_eq!(seen.len() as u64, raw.iter().map(|(_, size, _)| size).sum::<u64>());
            }
        }
    }
}
