//! Copy-on-write over a read-only device.
//!
//! Writes go to a sparse file of the overlay's own, block by block at the same offsets; a bitmap
//! says which blocks are there. A block enters the bitmap only after all of its bytes are in the
//! file, and never leaves it, so a read takes each block either whole from below or from the file.
//!
//! A write that covers part of a block that is still below must first bring the rest of that block
//! up. Two such writes, or one and a write of the whole block, would lose bytes if they ran
//! together; so bringing up excludes every other change of the overlay, while all other changes run
//! side by side. File systems with 4 KiB blocks never write parts of blocks, so this is rare.

use std::{fs::OpenOptions, ops::Range, os::unix::fs::OpenOptionsExt, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::RwLock;
use tracing::warn;

use crate::{
    BlockDevice, BlockError, DirtyBlocks, ReadDevice, Zeroing,
    bitmap::AtomicBitmap,
    device::check_range,
    file::{INLINE_MAX, PositionedFile, blocking},
};

/// The unit of copying and of the dirty bitmap, in bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// A writable device over a read-only one, which it leaves unchanged.
///
/// The overlay lives as long as this value: nothing about it but the bytes of its cache file is on
/// the disk, and the file is removed with the last reference.
pub struct Overlay {
    base: Arc<dyn ReadDevice>,
    cache: Arc<Cache>,
    /// Held shared by changes, exclusively by a change that brings up the rest of a block.
    changes: Arc<RwLock<()>>,
}

struct Cache {
    file: Arc<PositionedFile>,
    dirty: AtomicBitmap,
}

impl Drop for Cache {
    fn drop(&mut self) {
        let path = self.file.path();
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!(%error, path = %path.display(), "cannot remove an overlay's cache file");
        }
    }
}

enum Change {
    Data(Bytes),
    Zeros(u64, Zeroing),
}

impl Change {
    fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len, _) => *len,
        }
    }
}

impl Overlay {
    /// Makes an overlay over `base` whose writes go to a new file at `cache_path` (mode 0600),
    /// which must not exist.
    pub async fn create(
        base: Arc<dyn ReadDevice>,
        cache_path: impl Into<PathBuf>,
    ) -> Result<Self, BlockError> {
        let (path, size) = (cache_path.into(), base.size());
        let cache = blocking(move || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|e| BlockError::io("create", &path, e))?;
            let sized = file.set_len(size).map_err(|e| BlockError::io("set the size of", &path, e));
            // From here on the file is removed if anything fails.
            let cache = Cache {
                file: Arc::new(PositionedFile::new(file, path)),
                dirty: AtomicBitmap::new(size.div_ceil(BLOCK_SIZE)),
            };
            sized.map(|()| cache)
        })
        .await?;
        Ok(Self { base, cache: Arc::new(cache), changes: Arc::default() })
    }

    /// The blocks that were written or zeroed so far: what a snapshot must store.
    pub fn dirty(&self) -> DirtyBlocks {
        self.cache.dirty.snapshot()
    }

    /// The file with the overlay's own blocks, each at its offset in the device.
    pub fn cache_path(&self) -> &std::path::Path {
        self.cache.file.path()
    }

    /// Splits a range into pieces that lie as a whole in the cache or below.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (bool, Range<u64>)> + '_ {
        let end = offset + len;
        let mut at = offset;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let start = at;
                let (cached, run_end) = self.cache.dirty.run(start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE));
                at = (run_end * BLOCK_SIZE).min(end);
                (cached, start..at)
            })
        })
    }

    /// The bytes from below that share a block with the range, before and after it, where that
    /// block is not in the cache yet.
    fn missing(&self, offset: u64, len: u64) -> (Range<u64>, Range<u64>) {
        let end = offset + len;
        let (first, last) = (offset / BLOCK_SIZE, (end - 1) / BLOCK_SIZE);
        let before = first * BLOCK_SIZE..offset;
        let after = end..((last + 1) * BLOCK_SIZE).min(self.size());
        let unless_cached = |range: Range<u64>, block| {
            if self.cache.dirty.get(block) { range.start..range.start } else { range }
        };
        (unless_cached(before, first), unless_cached(after, last))
    }

    async fn read_below(&self, range: Range<u64>) -> Result<Vec<u8>, BlockError> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        if !bytes.is_empty() {
            self.base.read_at(range.start, &mut bytes).await?;
        }
        Ok(bytes)
    }

    async fn change(&self, offset: u64, change: Change) -> Result<(), BlockError> {
        let len = change.len();
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(());
        }
        let shared = self.changes.clone().read_owned().await;
        let (before, after) = self.missing(offset, len);
        if before.is_empty() && after.is_empty() {
            let cache = self.cache.clone();
            // The guard goes along: the change may outlive this future.
            return blocking(move || {
                let result = cache.apply(offset, &change);
                drop(shared);
                result
            })
            .await;
        }
        drop(shared);
        let exclusive = self.changes.clone().write_owned().await;
        // Another change may have brought the block up in the meantime, and written to it.
        let (before, after) = self.missing(offset, len);
        let (head, tail) = (self.read_below(before.clone()).await?, self.read_below(after.clone()).await?);
        let cache = self.cache.clone();
        blocking(move || {
            let result = cache
                .file
                .write(before.start, &head)
                .and_then(|()| cache.file.write(after.start, &tail))
                .and_then(|()| cache.apply(offset, &change));
            drop(exclusive);
            result
        })
        .await
    }
}

impl Cache {
    /// Puts a change into the file and then its blocks into the bitmap. Blocks.
    fn apply(&self, offset: u64, change: &Change) -> Result<(), BlockError> {
        match change {
            Change::Data(data) => return self.write(offset, data),
            // Also where nothing was written: a write that failed may have left bytes there.
            Change::Zeros(len, how) => self.file.zero(offset, *len, *how)?,
        }
        self.mark(offset, change.len());
        Ok(())
    }

    /// Puts data into the file and then its blocks into the bitmap. Blocks.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.file.write(offset, data)?;
        self.mark(offset, data.len() as u64);
        Ok(())
    }

    fn mark(&self, offset: u64, len: u64) {
        self.dirty.set(offset / BLOCK_SIZE..(offset + len).div_ceil(BLOCK_SIZE));
    }
}

/// The part of `buf`, which begins at `offset` of the device, for `range` of the device.
fn part<'a>(buf: &'a mut [u8], offset: u64, range: &Range<u64>) -> &'a mut [u8] {
    &mut buf[(range.start - offset) as usize..(range.end - offset) as usize]
}

#[async_trait]
impl ReadDevice for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        if buf.len() > INLINE_MAX {
            return Ok(false);
        }
        for (cached, range) in self.pieces(offset, buf.len() as u64) {
            let part = part(buf, offset, &range);
            let done = match cached {
                true => self.cache.file.try_read(range.start, part)?,
                false => self.base.try_read_at(range.start, part)?,
            };
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        for (cached, range) in self.pieces(offset, buf.len() as u64) {
            let part = part(buf, offset, &range);
            match cached {
                true => self.cache.file.read(range.start, part).await?,
                false => self.base.read_at(range.start, part).await?,
            }
        }
        Ok(())
    }
}

#[async_trait]
impl BlockDevice for Overlay {
    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<bool, BlockError> {
        let len = data.len() as u64;
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(true);
        }
        // Held by a change that brings up the rest of a block, or wanted by one.
        let Ok(_shared) = self.changes.try_read() else { return Ok(false) };
        let (before, after) = self.missing(offset, len);
        if !(before.is_empty() && after.is_empty()) {
            return Ok(false);
        }
        self.cache.write(offset, data)?;
        Ok(true)
    }

    async fn write_at(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.change(offset, Change::Data(data)).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError> {
        self.change(offset, Change::Zeros(len, how)).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        let cache = self.cache.clone();
        blocking(move || cache.file.sync()).await
    }
}
