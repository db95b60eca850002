//! A device whose header says which build stores which range of it.
//!
//! A header maps all of the device (see [`crate::header`]), so a read looks up its own pieces and
//! nothing else: how many builds lie between this one and its base does not matter.

use std::{collections::HashMap, ops::Range};

use async_trait::async_trait;
use nidus_storage::{BuildArtifact, BuildId, StorageError};

use crate::{
    BlockError, ReadDevice,
    device::check_range,
    file::{INLINE_MAX, blocking},
    header::{FrameTable, Header, Mapping},
    source::Source,
};

/// A read-only device made of ranges of builds' artifacts and of zeros. What is read is checked.
#[derive(Debug)]
pub struct MappedDevice {
    header: Header,
    sources: HashMap<BuildId, Source>,
}

impl MappedDevice {
    /// Opens, by `open`, the artifact of every build that the header names, and checks that it is as
    /// long as the header needs. `open` runs on a thread that may block.
    ///
    /// Fails with [`BlockError::Truncated`] where one is too short, and with [`BlockError::Compressed`]
    /// where the header says that one is stored in compressed frames of E2B's.
    pub async fn open<A: Into<BuildArtifact>>(
        header: Header,
        open: impl Fn(BuildId) -> Result<A, StorageError> + Send + 'static,
    ) -> Result<Self, BlockError> {
        blocking(move || {
            let mut sources = HashMap::new();
            for (build, len) in needed(&header) {
                let frames = header.stored_builds().get(&build).and_then(|s| s.frames.as_ref());
                if let Some(FrameTable { compression, .. }) = frames {
                    return Err(BlockError::Compressed { build, compression: *compression });
                }
                let artifact = open(build)?.into();
                if artifact.size() < len {
                    return Err(BlockError::Truncated { path: artifact.location(), offset: artifact.size() });
                }
                sources.insert(build, artifact.into());
            }
            Ok(Self { header, sources })
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

    /// The builds whose artifacts it reads, in no order.
    pub fn builds(&self) -> impl Iterator<Item = BuildId> + '_ {
        self.sources.keys().copied()
    }

    /// Gives the object store the order in which this device's artifacts there were read so far,
    /// for those that open them later. Does nothing for those that have one.
    pub async fn save_read_order(&self) -> Result<(), BlockError> {
        for source in self.sources.values() {
            if let Source::Remote { artifact, .. } = source {
                artifact.save_recording().await.map_err(StorageError::from)?;
            }
        }
        Ok(())
    }

    /// Fills `buf` from `offset` on this thread, which may have to wait for the disk or the network.
    pub fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.header.size())?;
        self.pieces(offset, buf, |source, at, part| source.read_blocking(at, part).map(|()| true)).map(drop)
    }

    fn source(&self, mapping: &Mapping) -> Result<&Source, BlockError> {
        // All of them were opened with the header.
        self.sources.get(&mapping.build).ok_or(BlockError::OutOfRange {
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
        read: impl Fn(&Source, u64, &mut [u8]) -> Result<bool, BlockError>,
    ) -> Result<bool, BlockError> {
        for m in self.header.extents(offset..offset + buf.len() as u64) {
            let part = &mut buf[(m.offset - offset) as usize..][..m.len as usize];
            if m.build.is_nil() {
                part.fill(0);
            } else if !read(self.source(&m)?, m.build_offset, part)? {
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
        self.pieces(offset, buf, Source::try_read)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        for m in self.header.extents(offset..offset + buf.len() as u64) {
            let part = &mut buf[(m.offset - offset) as usize..][..m.len as usize];
            if m.build.is_nil() {
                part.fill(0);
            } else {
                self.source(&m)?.read(m.build_offset, part).await?;
            }
        }
        Ok(())
    }
}
