//! Guest memory as a process has it: read and changed through `/proc/PID/mem`.
//!
//! A write to a private mapping makes the page the process's own (copy-on-write); the file that is
//! mapped stays as it is. So a VM whose memory differs from its memory file in a few pages maps the
//! file like all others do, and gets those pages written into its mapping before it runs.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::{
    Memfile, PagemapError,
    maps::{Mapping, mappings_of},
};

/// Why memory of a process could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The process or its mapping of the memory file is not as it must be.
    #[error(transparent)]
    Mapping(#[from] PagemapError),
    /// The range is not mapped.
    #[error("process {pid} does not map {len} bytes at {at} of its memory file")]
    OutOfRange {
        /// The process.
        pid: u32,
        /// Where the range begins in the memory file.
        at: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The kernel refused.
    #[error("cannot {action} the memory of process {pid} at {at}: {source}")]
    Access {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The process.
        pid: u32,
        /// Offset in the memory file.
        at: u64,
        /// The system's answer.
        source: io::Error,
    },
}

/// The private mapping of a memory file in a process that stands still.
///
/// Offsets are those of the memory file. Needs the right to trace the process. Everything blocks.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: u32,
    mem: File,
    mappings: Vec<Mapping>,
}

impl ProcessMemory {
    /// Finds the mapping of `memfile` in process `pid`, which must be private.
    pub fn open(pid: u32, memfile: &Memfile) -> Result<Self, PatchError> {
        let process = |action| move |source| PagemapError::Process { action, pid, source };
        let mappings = mappings_of(pid, memfile.id()).map_err(process("read the mappings"))?;
        let path = || memfile.path().to_owned();
        if mappings.is_empty() {
            return Err(PagemapError::NotMapped { pid, path: path() }.into());
        }
        if mappings.iter().any(|m| !m.private) {
            // A write would end up in the file, and so in every VM that has it.
            return Err(PagemapError::Shared { pid, path: path() }.into());
        }
        let mem = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let mem = mem.map_err(process("open the memory"))?;
        Ok(Self { pid, mem, mappings })
    }

    /// Fills `buf` from `at`.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<(), PatchError> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            let (address, len) = self.address(from, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + len];
            self.mem.read_exact_at(part, address).map_err(|e| self.refused("read", from, e))?;
            done += len;
        }
        Ok(())
    }

    /// Writes `data` at `at`, into the process alone.
    pub fn write_at(&self, at: u64, data: &[u8]) -> Result<(), PatchError> {
        let mut done = 0;
        while done < data.len() {
            let to = at + done as u64;
            let (address, len) = self.address(to, (data.len() - done) as u64)?;
            let part = &data[done..done + len];
            self.mem.write_all_at(part, address).map_err(|e| self.refused("change", to, e))?;
            done += len;
        }
        Ok(())
    }

    /// The address of offset `at`, and how many of `len` bytes follow in the same mapping.
    fn address(&self, at: u64, len: u64) -> Result<(u64, usize), PatchError> {
        let found = self.mappings.iter().find(|m| m.file_range().contains(&at));
        let Some(m) = found else { return Err(PatchError::OutOfRange { pid: self.pid, at, len }) };
        let skipped = at - m.offset;
        let left = m.file_range().end - at;
        Ok((m.addresses.start + skipped, left.min(len) as usize))
    }

    fn refused(&self, action: &'static str, at: u64, source: io::Error) -> PatchError {
        PatchError::Access { action, pid: self.pid, at, source }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::mman::MapFlags;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        PageSize,
        pagemap::{tests::*, written_ranges},
    };

    #[test]
    fn a_private_mapping_is_patched_and_its_file_is_not() {
        let dir = TempDir::new().unwrap();
        let memfile = memfile(&dir, 50, PageSize::Small);
        let before = std::fs::read(memfile.path()).unwrap();
        // In two mappings, so that a patch across their border is two writes.
        let first = map(memfile.path(), 0, 20 * PAGE, MapFlags::MAP_PRIVATE);
        let second = map(memfile.path(), 20 * PAGE, 30 * PAGE, MapFlags::MAP_PRIVATE);
        let child = child(&first, &[], &[3 * PAGE]);
        let memory = ProcessMemory::open(child.pid(), &memfile).unwrap();
        let mut expected = before.clone();
        expected[3 * PAGE] = 0xcc;
        for (page, pages, byte) in [(0, 1, 7), (18, 5, 8), (49, 1, 0)] {
            expected[page * PAGE..(page + pages) * PAGE].fill(byte);
            memory.write_at((page * PAGE) as u64, &vec![byte; pages * PAGE]).unwrap();
        }
        let mut seen = vec![0; 50 * PAGE];
        memory.read_at(0, &mut seen).unwrap();
        assert!(seen == expected);
        assert_eq!(
            pages_of(&written_ranges(child.pid(), &memfile).unwrap(), PAGE),
            [0, 3, 18, 19, 20, 21, 22, 49]
        );
        assert!(std::fs::read(memfile.path()).unwrap() == before);
        let error = memory.write_at(49 * PAGE as u64, &[1; 2 * PAGE]).unwrap_err();
        assert!(matches!(error, PatchError::OutOfRange { at: 204_800, .. }), "{error}");
        drop((child, second));
        let error = memory.read_at(0, &mut [0; 8]).unwrap_err();
        assert!(matches!(error, PatchError::Access { .. }), "{error}");
    }

    #[test]
    fn a_shared_mapping_is_refused() {
        let dir = TempDir::new().unwrap();
        let memfile = memfile(&dir, 4, PageSize::Small);
        let mapped = map(memfile.path(), 0, 4 * PAGE, MapFlags::MAP_SHARED);
        let child = child(&mapped, &[], &[]);
        let error = ProcessMemory::open(child.pid(), &memfile).unwrap_err();
        assert!(matches!(error, PatchError::Mapping(PagemapError::Shared { .. })), "{error}");
    }
}
