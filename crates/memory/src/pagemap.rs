//! Which pages of a private file mapping a process has written.
//!
//! A write to a page of a private mapping replaces the file's page by an anonymous one. So the
//! written pages are those that are present or swapped out and do not belong to a file; pages that
//! were only read, or never touched, belong to the file or are absent. The kernel tells by the
//! PAGEMAP_SCAN ioctl (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst), which visits only what
//! is mapped; before that, by the 8 bytes for each page in `/proc/PID/pagemap`.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    unistd::{SysconfVar, sysconf},
};

use self::scan::scan;
use crate::{Memfile, maps::mappings_of};

mod scan;
#[cfg(test)]
pub(crate) mod tests;

/// Why the written pages of a process cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// The process is gone, or belongs to another user.
    #[error("cannot {action} of process {pid}: {source}")]
    Process {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The process.
        pid: u32,
        /// The system's answer.
        source: io::Error,
    },
    /// The process has not mapped the memory file.
    #[error("process {pid} does not map the memory file {}", path.display())]
    NotMapped {
        /// The process.
        pid: u32,
        /// The memory file.
        path: std::path::PathBuf,
    },
    /// The process maps the memory file shared: what it writes is in the file itself.
    #[error("process {pid} maps the memory file {} shared, not private", path.display())]
    Shared {
        /// The process.
        pid: u32,
        /// The memory file.
        path: std::path::PathBuf,
    },
}

/// The parts of `memfile` that process `pid` has written in its private mapping of it, as byte
/// ranges of the file: ascending, apart, in whole pages of the memory file.
///
/// A page that was written with what it already held is among them. The answer is exact for the
/// moment only if the process does not write meanwhile: the VM must be paused. Needs the right to
/// trace the process. Blocks for some milliseconds.
pub fn written_ranges(pid: u32, memfile: &Memfile) -> Result<Vec<Range<u64>>, PagemapError> {
    written_ranges_by(pid, memfile, |pagemap, addresses, found| {
        match scan(pagemap, addresses.clone(), found) {
            Err(Errno::ENOTTY | Errno::EINVAL) => read_entries(pagemap, addresses, found),
            result => result.map_err(io::Error::from),
        }
    })
}

/// Adds the written address ranges of a mapping to a list.
type Finder = fn(&File, Range<u64>, &mut Vec<Range<u64>>) -> io::Result<()>;

fn written_ranges_by(pid: u32, memfile: &Memfile, find: Finder) -> Result<Vec<Range<u64>>, PagemapError> {
    let process = |action| move |source| PagemapError::Process { action, pid, source };
    let mappings = mappings_of(pid, memfile.id()).map_err(process("read the mappings"))?;
    if mappings.is_empty() {
        return Err(PagemapError::NotMapped { pid, path: memfile.path().to_owned() });
    }
    if mappings.iter().any(|m| !m.private) {
        return Err(PagemapError::Shared { pid, path: memfile.path().to_owned() });
    }
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(process("open the page map"))?;
    let mut written = Vec::new();
    for mapping in &mappings {
        let mut addresses = Vec::new();
        find(&pagemap, mapping.addresses.clone(), &mut addresses).map_err(process("read the page map"))?;
        let start = mapping.addresses.start;
        let file = mapping.file_range();
        written.extend(
            addresses.into_iter().map(|a| file.start + (a.start - start)..file.start + (a.end - start)),
        );
    }
    Ok(in_pages(written, memfile))
}

/// Rounds the ranges to whole pages of the file, orders them and joins those that touch.
fn in_pages(mut ranges: Vec<Range<u64>>, memfile: &Memfile) -> Vec<Range<u64>> {
    let page = memfile.page_size().bytes();
    ranges.sort_unstable_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let start = range.start / page * page;
        // A mapping may be longer than its file.
        let end = range.end.next_multiple_of(page).min(memfile.size());
        match out.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ if start < end => out.push(start..end),
            _ => {}
        }
    }
    out
}

/// Finds the written pages by the entries of the page map: bit 63 present, 62 swapped out, 61 of a
/// file or shared.
fn read_entries(pagemap: &File, addresses: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
    const ENTRY: u64 = 8;
    let page = match sysconf(SysconfVar::PAGE_SIZE)? {
        Some(page) if page > 0 => page as u64,
        _ => return Err(io::Error::other("the system's page size is unknown")),
    };
    let mut buffer = vec![0; 64 << 10];
    let mut at = addresses.start;
    while at < addresses.end {
        let entries = ((addresses.end - at) / page * ENTRY).min(buffer.len() as u64) as usize;
        pagemap.read_exact_at(&mut buffer[..entries], at / page * ENTRY)?;
        for entry in buffer[..entries].as_chunks::<8>().0 {
            let entry = u64::from_ne_bytes(*entry);
            if entry >> 62 != 0 && entry >> 61 & 1 == 0 {
                append(found, at..at + page);
            }
            at += page;
        }
    }
    Ok(())
}

fn append(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}
