//! Compaction: a build that reads from many others gets their blocks into its own file.
//!
//! Each pause adds a build to the line that a device is read from, and cuts its map into smaller pieces. A read of
//! some size then becomes many, of many files. What is compacted reads from two builds again: the one that
//! the line began with, which it shares with others, and itself. Its own blocks stay where they are, so
//! builds that were made from it read on; what it took from others comes after them.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use nidus_storage::BuildId;

use crate::{
    BlockError, Diff, MappedDevice,
    header::{GRANULE, Header, Mapping},
};

/// A device that is read from more builds than this, apart from the first and its own, is worth
/// compacting.
const MAX_BUILDS: usize = 6;
/// Likewise one that has more pieces than this, if some of them are others'.
const MAX_MAPPINGS: usize = 16 << 10;
/// Up to so many bytes between two pieces that are taken are taken along, so that the three become one.
const GAP: u64 = 64 << 10;
/// Blocks are read in pieces of at most this many bytes.
const PIECE: u64 = 256 << 10;
/// And written in pieces of this size, at multiples of it: the page cache keeps what is written at
/// once together, and reads of it are then nearly twice as fast.
const WRITTEN: usize = 1 << 20;

/// Whether a device with this header would be read notably faster after compaction.
pub fn wants_compaction(header: &Header) -> bool {
    let mut others: Vec<BuildId> =
        header.mappings().iter().filter(|m| is_taken(header, m)).map(|m| m.build).collect();
    others.sort_unstable();
    others.dedup();
    others.len() > MAX_BUILDS || !others.is_empty() && header.mappings().len() > MAX_MAPPINGS
}

/// Adds to `file`, which has what the device's build stores itself and can be written, what other
/// builds but the first store of the device. Returns the new header and size; nothing if `go_on` said
/// no. `path` is for error messages. Blocks.
pub fn compact(
    device: &MappedDevice,
    file: &File,
    path: &Path,
    go_on: impl Fn() -> bool,
) -> Result<Option<Diff>, BlockError> {
    let header = device.header();
    let own = file.metadata().map_err(|e| BlockError::io("inspect", path, e))?.len();
    let mut out = Appended { file, path, end: own.next_multiple_of(GRANULE), held: Vec::new() };
    let (mut changed, mut piece) = (Vec::new(), Vec::new());
    for run in runs(header) {
        let begin = out.end;
        let mut at = run.start;
        while at < run.end {
            if !go_on() {
                return Ok(None);
            }
            piece.resize((run.end - at).min(PIECE) as usize, 0);
            device.read_blocking(at, &mut piece)?;
            out.push(&piece)?;
            at += piece.len() as u64;
        }
        // The device's last block may be short.
        let missing = out.end.next_multiple_of(GRANULE) - out.end;
        out.push(&vec![0; missing as usize])?;
        let len = out.end - begin;
        changed.push(Mapping { offset: run.start, len, build: header.build(), build_offset: begin });
    }
    let stored = out.finish()?;
    let header = header.relocated(&changed)?;
    Ok(Some(Diff { header, stored }))
}

/// The end of a file, written in large pieces.
struct Appended<'a> {
    file: &'a File,
    path: &'a Path,
    /// Where the next byte goes.
    end: u64,
    /// The last bytes before that, not written yet.
    held: Vec<u8>,
}

impl Appended<'_> {
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), BlockError> {
        while !bytes.is_empty() {
            let room = WRITTEN - (self.end % WRITTEN as u64) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.held.extend_from_slice(now);
            self.end += now.len() as u64;
            bytes = later;
            if self.end.is_multiple_of(WRITTEN as u64) {
                self.write()?;
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), BlockError> {
        let begin = self.end - self.held.len() as u64;
        self.file.write_all_at(&self.held, begin).map_err(|e| BlockError::io("write", self.path, e))?;
        self.held.clear();
        Ok(())
    }

    /// Writes what is left; the file's size.
    fn finish(mut self) -> Result<u64, BlockError> {
        self.write()?;
        Ok(self.end)
    }
}

/// Whether a piece belongs to neither zeros, the first build nor the device's own.
fn is_taken(header: &Header, m: &Mapping) -> bool {
    !m.build.is_nil() && m.build != header.base() && m.build != header.build()
}

/// The ranges of the device that are copied, in its order.
fn runs(header: &Header) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for m in header.extents(0..header.size()).filter(|m| is_taken(header, m)) {
        let end = m.offset + m.len;
        match runs.last_mut() {
            Some(last) if m.offset - last.end <= GAP && is_stored(header, last.end..m.offset) => {
                last.end = end;
            }
            _ => runs.push(m.offset..end),
        }
    }
    runs
}

fn is_stored(header: &Header, range: Range<u64>) -> bool {
    header.extents(range).all(|m| !m.build.is_nil())
}
