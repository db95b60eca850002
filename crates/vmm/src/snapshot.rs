//! Where a snapshot's parts go, and what of the memory is in them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Files of a snapshot. They are the caller's: open for reading and writing, and empty.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// Receives the state of processors and devices.
    pub state: File,
    /// What becomes of the memory.
    pub memory: SaveMemory,
}

/// What becomes of a VM's memory in a snapshot.
#[derive(Debug)]
pub enum SaveMemory {
    /// It stays where it is; only the state is saved.
    Stay,
    /// All of it is written to the file.
    Full(File),
    /// What was written since the load (or since the last `Diff`) goes to the file at its own
    /// offset, the rest stays a hole. Without [`VmConfig::track_dirty`](crate::VmConfig), what was
    /// ever touched counts as written.
    Diff(File),
}

/// Where the memory of a saved VM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemorySaved {
    /// All of it in the file that it was booted with.
    InMemfile,
    /// In the process's private mapping of the memory file that it was loaded with. The file has
    /// the pages that were not written since.
    InMapping,
    /// All of it in the file that was given.
    Full,
    /// These byte ranges are in the file that was given, in ascending order; they are also the
    /// ranges of guest memory. The others are as they were at the load.
    Diff(Vec<Range<u64>>),
}

/// The byte ranges of a sparse file that hold data (lseek(2), SEEK_DATA and SEEK_HOLE). A file system may
/// report more than was written, never less.
pub fn data_ranges(file: &File) -> io::Result<Vec<Range<u64>>> {
    let end = file.metadata()?.len();
    let seek = |from: u64, whence| -> io::Result<Option<u64>> {
        let from = i64::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        // SAFETY: lseek has no memory effects.
        let r = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
        if let Ok(at) = u64::try_from(r) {
            return Ok(Some(at));
        }
        let e = io::Error::last_os_error();
        // Nothing but a hole from here on.
        if e.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(e) }
    };
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < end
        && let Some(start) = seek(at, libc::SEEK_DATA)?
    {
        let stop = seek(start, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        if stop <= start {
            break;
        }
        ranges.push(start..stop);
        at = stop;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn written_ranges_of_a_sparse_file_are_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        assert!(data_ranges(&file).unwrap().is_empty());
        file.write_all_at(&[1; 8192], 1 << 20).unwrap();
        file.write_all_at(&[2; 4096], (1 << 30) - 4096).unwrap();
        let ranges = data_ranges(&file).unwrap();
        assert_eq!(ranges, [(1 << 20)..(1 << 20) + 8192, (1 << 30) - 4096..1 << 30]);
    }

    #[test]
    fn a_full_and_an_empty_file() {
        let file = tempfile::tempfile().unwrap();
        assert!(data_ranges(&file).unwrap().is_empty());
        file.write_all_at(&[1; 5000], 0).unwrap();
        assert_eq!(data_ranges(&file).unwrap(), std::slice::from_ref(&(0..5000)));
    }
}
