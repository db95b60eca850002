//! Layers of an overlay: each a sparse file with a bitmap of the blocks that are in it.

use std::{fs::OpenOptions, ops::Range, os::unix::fs::OpenOptionsExt, path::PathBuf, sync::Arc};

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;
use tracing::warn;

use crate::{
    BLOCK_SIZE, BlockError, DirtyBlocks, Zeroing, bitmap::AtomicBitmap, device::check_range,
    file::PositionedFile,
};

/// Layers are merged in pieces of this size.
const PIECE: u64 = 1 << 20;

/// Blocks of a device, each at its own offset in a file, which is removed with the layer.
pub(crate) struct Layer {
    pub file: Arc<PositionedFile>,
    pub dirty: AtomicBitmap,
}

impl Drop for Layer {
    fn drop(&mut self) {
        let path = self.file.path();
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            warn!(%error, path = %path.display(), "cannot remove a layer's file");
        }
    }
}

pub(crate) enum Change {
    Data(Bytes),
    Zeros(u64, Zeroing),
}

impl Change {
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len, _) => *len,
        }
    }
}

impl Layer {
    /// An empty layer in a new file (mode 0600), which must not exist. Blocks.
    pub fn create(path: PathBuf, size: u64) -> Result<Self, BlockError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| BlockError::io("create", &path, e))?;
        let sized = file.set_len(size).map_err(|e| BlockError::io("set the size of", &path, e));
        // From here on the file is removed if anything fails.
        let layer = Self {
            file: Arc::new(PositionedFile::new(file, path)),
            dirty: AtomicBitmap::new(size.div_ceil(BLOCK_SIZE)),
        };
        sized.map(|()| layer)
    }

    /// Puts a change into the file and then its blocks into the bitmap. Blocks.
    pub fn apply(&self, offset: u64, change: &Change) -> Result<(), BlockError> {
        match change {
            Change::Data(data) => return self.write(offset, data),
            // Also where nothing was written: a write that failed may have left bytes there.
            Change::Zeros(len, how) => self.file.zero(offset, *len, *how)?,
        }
        self.mark(offset, change.len());
        Ok(())
    }

    /// Puts data into the file and then its blocks into the bitmap. Blocks.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.file.write(offset, data)?;
        self.mark(offset, data.len() as u64);
        Ok(())
    }

    fn mark(&self, offset: u64, len: u64) {
        self.dirty.set(offset / BLOCK_SIZE..(offset + len).div_ceil(BLOCK_SIZE));
    }
}

/// Splits a range into pieces, each with the first of the layers that has it, or none.
pub(crate) fn pieces(
    layers: &[Arc<Layer>],
    offset: u64,
    len: u64,
) -> impl Iterator<Item = (Option<&Arc<Layer>>, Range<u64>)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let start = at;
            let mut run_end = end.div_ceil(BLOCK_SIZE);
            let found = layers.iter().find(|layer| {
                let (is_there, stops) = layer.dirty.run(start / BLOCK_SIZE..run_end);
                // Where a layer above has nothing ends where it has something.
                run_end = stops;
                is_there
            });
            at = (run_end * BLOCK_SIZE).min(end);
            (found, start..at)
        })
    })
}

/// What an overlay held at one moment beyond the device below it. It stays as it was while the
/// overlay is written on.
pub struct Frozen {
    /// The newest first.
    layers: Vec<Arc<Layer>>,
    size: u64,
    /// While it lives, the overlay's frozen layers are neither merged nor added to.
    _alone: OwnedMutexGuard<()>,
}

impl Frozen {
    pub(crate) fn new(layers: Vec<Arc<Layer>>, size: u64, alone: OwnedMutexGuard<()>) -> Self {
        Self { layers, size, _alone: alone }
    }

    /// The bytes that were written or zeroed, in whole blocks up to the device's end; ascending,
    /// apart.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let dirty = DirtyBlocks::union(self.layers.iter().map(|l| &l.dirty));
        dirty.ranges().map(|r| r.start * BLOCK_SIZE..(r.end * BLOCK_SIZE).min(self.size)).collect()
    }

    /// Fills `buf` from `offset` on this thread. The range lies within one of [`Frozen::ranges`].
    pub fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let len = buf.len() as u64;
        check_range(offset, len, self.size)?;
        for (layer, range) in pieces(&self.layers, offset, len) {
            let nobody = BlockError::OutOfRange { offset: range.start, len, size: self.size };
            let part = &mut buf[(range.start - offset) as usize..(range.end - offset) as usize];
            layer.ok_or(nobody)?.file.read_blocking(range.start, part)?;
        }
        Ok(())
    }

    /// Brings everything into the oldest layer, which is the result. Readers of all the layers read
    /// right at every moment: what is overwritten in the oldest is hidden from them. Blocks.
    pub(crate) fn fold(&self) -> Result<Option<Arc<Layer>>, BlockError> {
        let Some((oldest, younger)) = self.layers.split_last() else { return Ok(None) };
        let mut piece = vec![0; PIECE as usize];
        for layer in younger.iter().rev() {
            for blocks in layer.dirty.snapshot().ranges() {
                let (mut at, end) = (blocks.start * BLOCK_SIZE, (blocks.end * BLOCK_SIZE).min(self.size));
                while at < end {
                    let part = &mut piece[..(end - at).min(PIECE) as usize];
                    layer.file.read_blocking(at, part)?;
                    oldest.write(at, part)?;
                    at += part.len() as u64;
                }
            }
        }
        Ok(Some(oldest.clone()))
    }
}
