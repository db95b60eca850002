//! Against a real child process that writes known pages of a real mapping.

use std::{
    fs::OpenOptions,
    io::Read,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    ptr::NonNull,
};

use nix::{
    libc,
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, pipe},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::PageSize;

pub(crate) const PAGE: usize = 4096;

/// A child that did its writes and now waits; killed and reaped when dropped.
pub(crate) struct Child(Pid);

impl Child {
    pub(crate) fn pid(&self) -> u32 {
        self.0.as_raw() as u32
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

pub(crate) struct Mapped {
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made; nobody holds a reference into it.
        unsafe { munmap(self.at, self.len).unwrap() };
    }
}

pub(crate) fn map(path: &Path, offset: usize, len: usize, flags: MapFlags) -> Mapped {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len_nonzero = NonZeroUsize::new(len).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let at = unsafe { mmap(None, len_nonzero, prot, flags, file.as_fd(), offset as i64) }.unwrap();
    Mapped { at, len }
}

/// A child in which the pages of `read` were read and those of `write` written, each at a byte of
/// the mapping.
pub(crate) fn child(mapped: &Mapped, read: &[usize], write: &[usize]) -> Child {
    let (done, done_tx): (OwnedFd, OwnedFd) = pipe().unwrap();
    let base = mapped.at.as_ptr().cast::<u8>();
    assert!(read.iter().chain(write).all(|offset| *offset < mapped.len));
    // SAFETY: between fork and its end the child only touches memory that was mapped before and
    // makes async-signal-safe system calls.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: the offsets were checked to lie within the mapping, which the child has too;
            // the system calls take plain values and a byte on the stack.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                for offset in read {
                    base.add(*offset).read_volatile();
                }
                for offset in write {
                    base.add(*offset).write_volatile(0xcc);
                }
                let fd = std::os::fd::AsRawFd::as_raw_fd(&done_tx);
                libc::write(fd, [1u8].as_ptr().cast(), 1);
                loop {
                    libc::pause();
                }
            }
        }
        ForkResult::Parent { child } => {
            let child = Child(child);
            drop(done_tx);
            std::fs::File::from(done).read_exact(&mut [0]).unwrap();
            child
        }
    }
}

pub(crate) fn memfile(dir: &TempDir, pages: usize, page_size: PageSize) -> Memfile {
    let path = dir.path().join("memfile");
    let contents: Vec<u8> = (0..pages * PAGE).map(|i| (i / PAGE % 255) as u8).collect();
    std::fs::write(&path, contents).unwrap();
    Memfile::open(path, page_size, Some((pages * PAGE) as u64)).unwrap()
}

/// Both ways to ask, which must agree; the first only where the kernel has it.
fn ask(pid: u32, memfile: &Memfile) -> Vec<Range<u64>> {
    let by_entries = written_ranges_by(pid, memfile, read_entries).unwrap();
    match written_ranges_by(pid, memfile, |p, a, f| scan(p, a, f).map_err(io::Error::from)) {
        Ok(by_scan) => assert_eq!(by_scan, by_entries),
        Err(e) => eprintln!("PAGEMAP_SCAN was not tried: {e}"),
    }
    assert_eq!(written_ranges(pid, memfile).unwrap(), by_entries);
    by_entries
}

pub(crate) fn pages_of(ranges: &[Range<u64>], page: usize) -> Vec<usize> {
    assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "{ranges:?}");
    ranges.iter().flat_map(|r| (r.start as usize / page)..(r.end as usize / page)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_written_pages_and_no_others_are_named(
        reads in prop::collection::vec(0..700usize * PAGE, 0..300),
        writes in prop::collection::vec(0..700usize * PAGE, 0..300),
        run in (0usize..600, 0usize..100),
    ) {
        let dir = TempDir::new().unwrap();
        let memfile = memfile(&dir, 700, PageSize::Small);
        let writes: Vec<usize> = writes.into_iter().chain((run.0..run.0 + run.1).map(|p| p * PAGE)).collect();
        let mapped = map(memfile.path(), 0, 700 * PAGE, MapFlags::MAP_PRIVATE);
        let child = child(&mapped, &reads, &writes);
        let mut expected: Vec<usize> = writes.iter().map(|at| at / PAGE).collect();
        expected.sort_unstable();
        expected.dedup();
        prop_assert_eq!(pages_of(&ask(child.pid(), &memfile), PAGE), expected);
    }
}

#[test]
fn more_ranges_than_one_call_returns_are_all_named() {
    let dir = TempDir::new().unwrap();
    let memfile = memfile(&dir, 4000, PageSize::Small);
    let mapped = map(memfile.path(), 0, 4000 * PAGE, MapFlags::MAP_PRIVATE);
    let writes: Vec<usize> = (0..4000).step_by(2).map(|p| p * PAGE + 9).collect();
    let child = child(&mapped, &[], &writes);
    let ranges = ask(child.pid(), &memfile);
    assert_eq!(ranges.len(), 2000);
    assert_eq!(pages_of(&ranges, PAGE), (0..4000).step_by(2).collect::<Vec<_>>());
}

#[test]
fn huge_pages_are_named_whole() {
    let dir = TempDir::new().unwrap();
    let memfile = memfile(&dir, 4 * 512, PageSize::Huge);
    let mapped = map(memfile.path(), 0, 2048 * PAGE, MapFlags::MAP_PRIVATE);
    let child = child(&mapped, &[], &[5 * PAGE, 600 * PAGE, 2047 * PAGE]);
    assert_eq!(ask(child.pid(), &memfile), [0..4 << 20, 6 << 20..8 << 20]);
}

#[test]
fn a_file_mapped_in_pieces_is_one_file() {
    let dir = TempDir::new().unwrap();
    let memfile = memfile(&dir, 100, PageSize::Small);
    // The later part of the file first; the parts are not neighbours in memory by contract.
    let late = map(memfile.path(), 50 * PAGE, 50 * PAGE, MapFlags::MAP_PRIVATE);
    let early = map(memfile.path(), 0, 50 * PAGE, MapFlags::MAP_PRIVATE);
    let writer = child(&late, &[], &[0, 49 * PAGE]);
    assert_eq!(ask(writer.pid(), &memfile), [204_800..208_896, 405_504..409_600]);
    drop(writer);
    let writer = child(&early, &[], &[49 * PAGE]);
    assert_eq!(pages_of(&ask(writer.pid(), &memfile), PAGE), [49]);
}

#[test]
fn what_cannot_be_told_is_an_error() {
    let dir = TempDir::new().unwrap();
    let memfile = memfile(&dir, 10, PageSize::Small);
    let me = std::process::id();
    let error = written_ranges(me, &memfile).unwrap_err();
    assert!(matches!(error, PagemapError::NotMapped { .. }), "{error}");
    let shared = map(memfile.path(), 0, 10 * PAGE, MapFlags::MAP_SHARED);
    let sharer = child(&shared, &[], &[]);
    let error = written_ranges(sharer.pid(), &memfile).unwrap_err();
    assert!(matches!(error, PagemapError::Shared { .. }), "{error}");
    let gone = sharer.pid();
    drop(sharer);
    let error = written_ranges(gone, &memfile).unwrap_err();
    assert!(error.to_string().contains(&format!("of process {gone}")), "{error}");
}
