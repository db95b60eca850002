//! The PAGEMAP_SCAN ioctl.

use std::{fs::File, ops::Range, os::fd::AsRawFd};

use nix::errno::Errno;

use super::append;

/// `struct page_region` of the kernel's `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of the kernel's `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
pub struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

nix::ioctl_readwrite!(
    /// `PAGEMAP_SCAN` of the kernel's `linux/fs.h`.
    pagemap_scan,
    b'f',
    16,
    ScanArgs
);

/// Finds the written pages by PAGEMAP_SCAN.
pub(super) fn scan(pagemap: &File, addresses: Range<u64>, found: &mut Vec<Range<u64>>) -> Result<(), Errno> {
    let mut regions = [PageRegion::default(); 512];
    let mut start = addresses.start;
    while start < addresses.end {
        let mut args = ScanArgs {
            size: size_of::<ScanArgs>() as u64,
            start,
            end: addresses.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            // Not of a file, and present or swapped out.
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // Regions are joined where the returned categories agree: ask for none that differs.
            return_mask: PAGE_IS_FILE,
            ..ScanArgs::default()
        };
        // SAFETY: the descriptor is open; `args` has the kernel's layout and says its size; `vec`
        // and `vec_len` describe `regions`, which nobody else uses during the call. With no flags
        // set the call changes nothing in the process.
        let count = unsafe { pagemap_scan(pagemap.as_raw_fd(), &mut args) };
        let count = match count {
            Err(Errno::EINTR) => continue,
            count => count? as usize,
        };
        for region in &regions[..count.min(regions.len())] {
            append(found, region.start..region.end);
        }
        if args.walk_end <= start {
            // Without progress it would never end; the kernel does not do this.
            return Err(Errno::EIO);
        }
        start = args.walk_end;
    }
    Ok(())
}
