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
//!
//! [`Overlay::freeze`] puts a new, empty layer on top: what was written until then stands still and
//! can be stored while the guest writes on.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    BlockDevice, BlockError, DirtyBlocks, ReadDevice, Zeroing,
    device::check_range,
    file::{INLINE_MAX, blocking},
    layers::{Change, Frozen, Layer, pieces},
};

/// The unit of copying and of the dirty bitmap, in bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// A writable device over a read-only one, which it leaves unchanged.
///
/// The overlay lives as long as this value: nothing about it but the bytes of its layers' files is
/// on the disk, and the files are removed with the last reference.
pub struct Overlay {
    base: Arc<dyn ReadDevice>,
    /// The newest first; it alone is written. Never empty.
    layers: parking_lot::RwLock<Arc<[Arc<Layer>]>>,
    /// Held shared by changes, exclusively by a change that brings up the rest of a block and by
    /// what puts another layer on top.
    changes: Arc<tokio::sync::RwLock<()>>,
    /// Held by the one [`Frozen`] that there may be.
    frozen: Arc<tokio::sync::Mutex<()>>,
    path: PathBuf,
    /// Layers made so far, for the names of their files.
    made: AtomicU64,
}

impl Overlay {
    /// Makes an overlay over `base` whose writes go to a new file at `path` (mode 0600), which must
    /// not exist. Files of later layers have a number added to that name.
    pub async fn create(base: Arc<dyn ReadDevice>, path: impl Into<PathBuf>) -> Result<Self, BlockError> {
        let (path, size) = (path.into(), base.size());
        let first = path.clone();
        let layer = blocking(move || Layer::create(first, size)).await?;
        Ok(Self {
            base,
            layers: parking_lot::RwLock::new([Arc::new(layer)].into()),
            changes: Arc::default(),
            frozen: Arc::default(),
            path,
            made: AtomicU64::new(1),
        })
    }

    /// The blocks that were written or zeroed so far.
    pub fn dirty(&self) -> DirtyBlocks {
        DirtyBlocks::union(self.layers().iter().map(|l| &l.dirty))
    }

    /// Everything that was written so far, standing still: later writes go to a new layer. Waits
    /// for writes that are under way, and for an earlier result of this to be dropped or
    /// [merged](Overlay::merge).
    pub async fn freeze(&self) -> Result<Frozen, BlockError> {
        let alone = self.frozen.clone().lock_owned().await;
        let (number, size) = (self.made.fetch_add(1, Relaxed), self.size());
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        let top = Arc::new(blocking(move || Layer::create(name.into(), size)).await?);
        let _exclusive = self.changes.write().await;
        let mut layers = self.layers.write();
        let below = layers.to_vec();
        *layers = std::iter::once(top).chain(below.iter().cloned()).collect();
        Ok(Frozen::new(below, size, alone))
    }

    /// Makes one layer of those that were frozen, so that reads need not look through many. After
    /// an error all is as it was.
    pub async fn merge(&self, frozen: Frozen) -> Result<(), BlockError> {
        let (frozen, merged) = blocking(move || frozen.fold().map(|merged| (frozen, merged))).await?;
        let mut layers = self.layers.write();
        let top = layers.first().cloned();
        *layers = top.into_iter().chain(merged).collect();
        drop(layers);
        // Only now may there be another.
        drop(frozen);
        Ok(())
    }

    fn layers(&self) -> Arc<[Arc<Layer>]> {
        self.layers.read().clone()
    }

    /// The bytes from below that share a block with the range, before and after it, where that
    /// block is not in the layer yet.
    fn missing(&self, layer: &Layer, offset: u64, len: u64) -> (Range<u64>, Range<u64>) {
        let end = offset + len;
        let (first, last) = (offset / BLOCK_SIZE, (end - 1) / BLOCK_SIZE);
        let before = first * BLOCK_SIZE..offset;
        let after = end..((last + 1) * BLOCK_SIZE).min(self.size());
        let unless_there = |range: Range<u64>, block| {
            if layer.dirty.get(block) { range.start..range.start } else { range }
        };
        (unless_there(before, first), unless_there(after, last))
    }

    async fn read_from(&self, layers: &[Arc<Layer>], offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        for (layer, range) in pieces(layers, offset, buf.len() as u64) {
            let part = part(buf, offset, &range);
            match layer {
                Some(layer) => layer.file.read(range.start, part).await?,
                None => self.base.read_at(range.start, part).await?,
            }
        }
        Ok(())
    }

    async fn change(&self, offset: u64, change: Change) -> Result<(), BlockError> {
        let len = change.len();
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(());
        }
        let shared = self.changes.clone().read_owned().await;
        let layers = self.layers();
        let (before, after) = self.missing(&layers[0], offset, len);
        if before.is_empty() && after.is_empty() {
            // The guard goes along: the change may outlive this future.
            return blocking(move || {
                let result = layers[0].apply(offset, &change);
                drop(shared);
                result
            })
            .await;
        }
        drop(shared);
        let exclusive = self.changes.clone().write_owned().await;
        // Another change may have brought the block up in the meantime, and written to it; or there
        // is another layer.
        let layers = self.layers();
        let (before, after) = self.missing(&layers[0], offset, len);
        let bytes = |range: &Range<u64>| vec![0; (range.end - range.start) as usize];
        let (mut head, mut tail) = (bytes(&before), bytes(&after));
        self.read_from(&layers[1..], before.start, &mut head).await?;
        self.read_from(&layers[1..], after.start, &mut tail).await?;
        blocking(move || {
            let top = &layers[0];
            let result = top
                .file
                .write(before.start, &head)
                .and_then(|()| top.file.write(after.start, &tail))
                .and_then(|()| top.apply(offset, &change));
            drop(exclusive);
            result
        })
        .await
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
        let layers = self.layers();
        for (layer, range) in pieces(&layers, offset, buf.len() as u64) {
            let part = part(buf, offset, &range);
            let done = match layer {
                Some(layer) => layer.file.try_read(range.start, part)?,
                None => self.base.try_read_at(range.start, part)?,
            };
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.read_from(&self.layers(), offset, buf).await
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
        let layers = self.layers();
        let (before, after) = self.missing(&layers[0], offset, len);
        if !(before.is_empty() && after.is_empty()) {
            return Ok(false);
        }
        layers[0].write(offset, data)?;
        Ok(true)
    }

    async fn write_at(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.change(offset, Change::Data(data)).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError> {
        self.change(offset, Change::Zeros(len, how)).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        let layers = self.layers();
        blocking(move || layers.iter().try_for_each(|layer| layer.file.sync())).await
    }
}
