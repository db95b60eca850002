//! Files as seen by devices: positioned reads that do not wait, and the rest on blocking threads.

use std::{
    fs::File,
    io::IoSliceMut,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::{Errno, ReadWriteFlags, preadv2},
};

use crate::{BlockError, ReadDevice, Zeroing, device::check_range};

/// The most that one read copies on a runtime thread: about 100 µs from the page cache.
pub(crate) const INLINE_MAX: usize = 1 << 20;

/// Zeros are written in pieces of this size where the file system cannot make holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file with positioned access and errors that name it.
#[derive(Debug)]
pub(crate) struct PositionedFile {
    file: File,
    path: PathBuf,
}

impl PositionedFile {
    pub(crate) fn new(file: File, path: PathBuf) -> Self {
        Self { file, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buf` if all of it is in the page cache.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        try_read(&self.file, &self.path, offset, buf)
    }

    /// Fills `buf`; waits for the disk on a blocking thread if it must.
    pub(crate) async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        read_or_wait(self, offset, buf, Self::try_read, Self::read_blocking).await
    }

    /// Fills `buf`. Blocks.
    pub(crate) fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        read_blocking(&self.file, &self.path, offset, buf)
    }

    /// Writes all of `data`. Blocks.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.file.write_all_at(data, offset).map_err(|e| BlockError::io("write", &self.path, e))
    }

    /// Makes the range read as zeros; the file's size stays. Blocks.
    pub(crate) fn zero(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError> {
        let flags = match how {
            Zeroing::Hole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Zeroing::Allocate => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        loop {
            return match fallocate(&self.file, flags, offset, len) {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, len),
                Err(e) => Err(BlockError::io("zero a range of", &self.path, e)),
            };
        }
    }

    fn write_zeros(&self, mut offset: u64, len: u64) -> Result<(), BlockError> {
        let end = offset + len;
        while offset < end {
            let piece = (end - offset).min(ZEROS.len() as u64);
            self.write(offset, &ZEROS[..piece as usize])?;
            offset += piece;
        }
        Ok(())
    }

    /// Flushes the file's data, and what metadata is needed to read it, to the disk. Blocks.
    pub(crate) fn sync(&self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(|e| BlockError::io("flush to the disk", &self.path, e))
    }
}

/// Fills `buf` from a file if all of it is in the page cache.
pub(crate) fn try_read(file: &File, path: &Path, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
    if buf.len() > INLINE_MAX {
        return Ok(false);
    }
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let rest = &mut [IoSliceMut::new(&mut buf[done..])];
        match preadv2(file, rest, at, ReadWriteFlags::NOWAIT) {
            Ok(0) => return Err(BlockError::Truncated { path: path.to_owned(), offset: at }),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            // Not cached, or a file system or kernel that cannot tell.
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
            Err(e) => return Err(BlockError::io("read", path, e)),
        }
    }
    Ok(true)
}

/// Fills `buf` from a file. Blocks.
pub(crate) fn read_blocking(file: &File, path: &Path, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
    file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            BlockError::Truncated { path: path.to_owned(), offset: offset + buf.len() as u64 }
        }
        _ => BlockError::io("read", path, e),
    })
}

/// Fills `buf` by `try_read` from the page cache, or else by `read_blocking` on a blocking thread.
pub(crate) async fn read_or_wait<F: Send + Sync + 'static>(
    file: &Arc<F>,
    offset: u64,
    buf: &mut [u8],
    try_read: fn(&F, u64, &mut [u8]) -> Result<bool, BlockError>,
    read_blocking: fn(&F, u64, &mut [u8]) -> Result<(), BlockError>,
) -> Result<(), BlockError> {
    if try_read(file, offset, buf)? {
        return Ok(());
    }
    let (file, len) = (file.clone(), buf.len());
    let bytes = blocking(move || {
        let mut bytes = vec![0; len];
        read_blocking(&file, offset, &mut bytes).map(|()| bytes)
    })
    .await?;
    buf.copy_from_slice(&bytes);
    Ok(())
}

/// Runs `work`, which may wait for a disk, on a blocking thread. It runs to its end even if the
/// returned future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlockError> + Send + 'static,
) -> Result<T, BlockError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(BlockError::Shutdown),
        },
    }
}

/// A read-only device over a whole file, such as a template's root file system.
#[derive(Debug)]
pub struct FileDevice {
    file: Arc<PositionedFile>,
    size: u64,
}

impl FileDevice {
    /// Opens the file read-only. Its size now is the device's size.
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self, BlockError> {
        let path = path.into();
        blocking(move || {
            let file = File::open(&path).map_err(|e| BlockError::io("open", &path, e))?;
            let size = file.metadata().map_err(|e| BlockError::io("inspect", &path, e))?.len();
            Ok(Self { file: Arc::new(PositionedFile::new(file, path)), size })
        })
        .await
    }
}

#[async_trait]
impl ReadDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.file.try_read(offset, buf)
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.file.read(offset, buf).await
    }
}
