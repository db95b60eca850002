//! A device whose header says which build's file stores which range of it.
//!
//! A header maps all of the device (see [`crate::header`]), so a read looks up its own pieces and
//! nothing else: how many builds lie between this one and its base does not matter.

use std::{collections::HashMap, ops::Range, sync::Arc};

use async_trait::async_trait;
use nidus_storage::{ArtifactFile, BuildId, StorageError};

use crate::{
    BlockError, ReadDevice,
    checked::CheckedFile,
    device::check_range,
    file::{INLINE_MAX, blocking},
    header::{Header, Mapping},
};

/// A read-only device made of ranges of builds' files and of zeros. What is read is checked.
#[derive(Debug)]
pub struct MappedDevice {
    header: Header,
    files: HashMap<BuildId, Arc<CheckedFile>>,
}

impl MappedDevice {
    /// Opens, by `open`, the file of every build that the header names, and checks that it is as
    /// long as the header needs.
    ///
    /// Fails with [`BlockError::Truncated`] where a file is too short.
    pub async fn open(
        header: Header,
        open: impl Fn(BuildId) -> Result<ArtifactFile, StorageError> + Send + 'static,
    ) -> Result<Self, BlockError> {
        blocking(move || {
            let mut files = HashMap::new();
            for (build, len) in needed(&header) {
                let file = open(build)?;
                if file.size() < len {
                    return Err(BlockError::Truncated { path: file.path().to_owned(), offset: file.size() });
                }
                files.insert(build, Arc::new(CheckedFile::new(file)));
            }
            Ok(Self { header, files })
        })
        .await
    }

    /// The map.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether the map says that the whole range is zeros. A range that is stored may be zeros too.
    pub fn is_unstored(&self, range: Range<u64>) -> bool {
        self.header.extents(range).all(|m| m.build.is_nil())
    }

    /// The builds whose files it reads, in no order.
    pub fn builds(&self) -> impl Iterator<Item = BuildId> + '_ {
        self.files.keys().copied()
    }

    /// Fills `buf` from `offset` on this thread, which may have to wait for the disk.
    pub fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.header.size())?;
        self.pieces(offset, buf, |file, at, part| file.read_blocking(at, part).map(|()| true)).map(drop)
    }

    fn file(&self, mapping: &Mapping) -> Result<&Arc<CheckedFile>, BlockError> {
        // All of them were opened with the header.
        self.files.get(&mapping.build).ok_or(BlockError::OutOfRange {
            offset: mapping.offset,
            len: mapping.len,
            size: self.header.size(),
        })
    }

    /// Fills each piece of `buf` until one says that it did not.
    fn pieces(
        &self,
        offset: u64,
        buf: &mut [u8],
        read: impl Fn(&CheckedFile, u64, &mut [u8]) -> Result<bool, BlockError>,
    ) -> Result<bool, BlockError> {
        for m in self.header.extents(offset..offset + buf.len() as u64) {
            let part = &mut buf[(m.offset - offset) as usize..][..m.len as usize];
            if m.build.is_nil() {
                part.fill(0);
            } else if !read(self.file(&m)?, m.build_offset, part)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// How many bytes each build's file must have. The last block of a device may be cut short.
fn needed(header: &Header) -> HashMap<BuildId, u64> {
    let mut needed = HashMap::new();
    for m in header.extents(0..header.size()).filter(|m| !m.build.is_nil()) {
        let len: &mut u64 = needed.entry(m.build).or_default();
        *len = (*len).max(m.build_offset + m.len);
    }
    needed
}

#[async_trait]
impl ReadDevice for MappedDevice {
    fn size(&self) -> u64 {
        self.header.size()
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        if buf.len() > INLINE_MAX {
            return Ok(false);
        }
        self.pieces(offset, buf, CheckedFile::try_read)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        for m in self.header.extents(offset..offset + buf.len() as u64) {
            let part = &mut buf[(m.offset - offset) as usize..][..m.len as usize];
            if m.build.is_nil() {
                part.fill(0);
            } else {
                self.file(&m)?.read(m.build_offset, part).await?;
            }
        }
        Ok(())
    }
}
