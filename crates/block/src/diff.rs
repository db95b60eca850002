//! What a build must store of a device that differs from its parent's.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use nidus_storage::BuildId;

use crate::{
    BlockError, MappedDevice,
    header::{GRANULE, Header, HeaderError, Mapping},
};

/// Writes the blocks that differ from the parent one after another into a build's file, and
/// collects where they are. Blocks that became zeros are not stored, nor are those that are as they were.
///
/// All of it blocks on the disk.
#[derive(Debug)]
pub struct DiffWriter<'a> {
    parent: &'a MappedDevice,
    build: BuildId,
    file: &'a File,
    path: &'a Path,
    stored: u64,
    changed: Vec<Mapping>,
    before: Vec<u8>,
}

/// The result of a [`DiffWriter`].
#[derive(Debug)]
pub struct Diff {
    /// The build's header.
    pub header: Header,
    /// How many bytes its file has.
    pub stored: u64,
}

impl<'a> DiffWriter<'a> {
    /// A writer of what `build` stores itself. The file is empty; `path` is for error messages.
    pub fn new(parent: &'a MappedDevice, build: BuildId, file: &'a File, path: &'a Path) -> Self {
        Self { parent, build, file, path, stored: 0, changed: Vec::new(), before: Vec::new() }
    }

    /// Takes the device's content of now at `offset`, which may or may not have changed. Pieces
    /// come in ascending order, begin at whole granules, and end so or with the device.
    pub fn push(&mut self, offset: u64, now: &[u8]) -> Result<(), BlockError> {
        let mut before = std::mem::take(&mut self.before);
        before.resize(now.len(), 0);
        self.parent.read_blocking(offset, &mut before)?;
        let granule = GRANULE as usize;
        // Where the blocks begin that are to be stored and are not yet.
        let mut pending = None;
        for (n, (new, old)) in now.chunks(granule).zip(before.chunks(granule)).enumerate() {
            let at = n * granule;
            let zero = new.iter().all(|b| *b == 0);
            if new != old && !zero {
                pending.get_or_insert(at);
                continue;
            }
            if let Some(start) = pending.take() {
                self.store(offset + start as u64, &now[start..at])?;
            }
            if new != old {
                let nobody = BuildId::NIL;
                self.changed.push(Mapping {
                    offset: offset + at as u64,
                    len: GRANULE,
                    build: nobody,
                    build_offset: 0,
                });
            }
        }
        if let Some(start) = pending {
            self.store(offset + start as u64, &now[start..])?;
        }
        self.before = before;
        Ok(())
    }

    fn store(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.file.write_all_at(data, self.stored).map_err(|e| BlockError::io("write", self.path, e))?;
        let len = (data.len() as u64).next_multiple_of(GRANULE);
        self.changed.push(Mapping { offset, len, build: self.build, build_offset: self.stored });
        self.stored += len;
        Ok(())
    }

    /// The header, merged with the parent's.
    pub fn finish(self) -> Result<Diff, HeaderError> {
        let header = self.parent.header().child(self.build, &self.changed)?;
        Ok(Diff { header, stored: self.stored })
    }
}
