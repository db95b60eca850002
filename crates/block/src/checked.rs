//! Builds' artifacts as seen by devices: read at any offset, checked block by block.

use std::{ops::Range, sync::Arc};

use nidus_storage::{ArtifactFile, CHECKED_BLOCK, StorageError};

use crate::{BlockError, file};

/// An artifact with positioned reads whose bytes are those that were published.
#[derive(Debug)]
pub(crate) struct CheckedFile(ArtifactFile);

impl CheckedFile {
    pub(crate) fn new(file: ArtifactFile) -> Self {
        Self(file)
    }

    /// Fills `buf` if all of it is in the page cache.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        let (file, path) = (self.0.file(), self.0.path());
        self.checked(offset, buf, |at, bytes| file::try_read(file, path, at, bytes))
    }

    /// Fills `buf`; waits for the disk on a blocking thread if it must.
    pub(crate) async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        file::read_or_wait(self, offset, buf, Self::try_read, Self::read_blocking).await
    }

    /// Fills `buf`. Blocks.
    pub(crate) fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let (file, path) = (self.0.file(), self.0.path());
        let read = |at, bytes: &mut [u8]| file::read_blocking(file, path, at, bytes).map(|()| true);
        self.checked(offset, buf, read).map(drop)
    }

    /// Fills `buf` by `read`, unless that says that it did not, and checks what was read.
    fn checked(
        &self,
        offset: u64,
        buf: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<bool, BlockError>,
    ) -> Result<bool, BlockError> {
        let wanted = offset..offset + buf.len() as u64;
        let blocks = self.blocks(&wanted);
        if blocks == wanted {
            return self.read_blocks(offset, buf, read);
        }
        // Parts of blocks: file systems hardly ever ask for those.
        let mut whole = vec![0; (blocks.end - blocks.start) as usize];
        let done = self.read_blocks(blocks.start, &mut whole, read)?;
        buf.copy_from_slice(&whole[(offset - blocks.start) as usize..][..buf.len()]);
        Ok(done)
    }

    /// The whole blocks that a range lies in; the last one of the artifact may be short.
    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.next_multiple_of(CHECKED_BLOCK).min(self.0.size()).max(range.end);
        range.start / CHECKED_BLOCK * CHECKED_BLOCK..end
    }

    fn read_blocks(
        &self,
        offset: u64,
        bytes: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<bool, BlockError>,
    ) -> Result<bool, BlockError> {
        match read(offset, bytes) {
            Ok(true) => self.0.check(offset, bytes).map_err(StorageError::from)?,
            Ok(false) => return Ok(false),
            Err(BlockError::Truncated { .. }) => return Err(StorageError::from(self.0.cut()).into()),
            Err(e) => return Err(e),
        }
        Ok(true)
    }
}
