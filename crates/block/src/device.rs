//! What a block device is, and how its operations fail.

use std::{
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use bytes::Bytes;
use nidus_storage::{BuildId, StorageError};

use crate::header::{Compression, HeaderError};

/// A device that can be read at any offset and length within its size.
#[async_trait]
pub trait ReadDevice: Send + Sync + 'static {
    /// The size in bytes. It never changes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` if that needs no waiting, and says whether it did.
    ///
    /// When it did not (`Ok(false)`), the contents of `buf` are unspecified. Never blocks on a disk
    /// or a network.
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, BlockError>;

    /// Fills `buf` from `offset`.
    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError>;
}

/// A device that can also be written.
///
/// Operations that are in flight together may take effect in any order; what was written by one
/// that has returned is seen by every later read. Once an operation has begun, dropping its future
/// does not undo it, and may not stop it.
#[async_trait]
pub trait BlockDevice: ReadDevice {
    /// Writes `data` at `offset` if that needs neither a read from a disk or a network nor another
    /// operation to end first, and says whether it did. When it did not (`Ok(false)`), nothing was
    /// written.
    ///
    /// It goes to the page cache, where the kernel holds writers up when too much waits to be
    /// written: not for threads that others wait for. A device may always answer `Ok(false)`.
    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<bool, BlockError> {
        let _ = (offset, data);
        Ok(false)
    }

    /// Writes `data` at `offset`.
    async fn write_at(&self, offset: u64, data: Bytes) -> Result<(), BlockError>;

    /// Makes `len` bytes from `offset` read as zeros.
    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), BlockError>;

    /// Says that the contents of `len` bytes from `offset` are no longer needed. They read as
    /// zeros afterwards.
    async fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, len, Zeroing::Hole).await
    }

    /// Returns once everything that was written by operations that have returned is on the disk.
    async fn flush(&self) -> Result<(), BlockError>;
}

/// What zeroing does with the space of the zeroed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// Gives it back to the host's file system.
    Hole,
    /// Keeps or makes it allocated, so that later writes there cannot run out of space.
    Allocate,
}

/// Why an operation on a device failed.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The range is not within the device.
    #[error("{len} bytes at {offset} are not within the device's {size} bytes")]
    OutOfRange {
        /// Where the range begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The device's size in bytes.
        size: u64,
    },
    /// The file system below (or its quota) has no room left.
    #[error("no space left on the disk to {action} {}", path.display())]
    NoSpace {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The file below the device.
        path: PathBuf,
    },
    /// The file below ended where it should have had data: someone truncated it.
    #[error("{} ends before {offset}", path.display())]
    Truncated {
        /// The file below the device.
        path: PathBuf,
        /// The offset in it that could not be read.
        offset: u64,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The file below the device.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A build's artifact cannot be opened, or its bytes are not those that were published.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A build is stored in a way that is not read here.
    #[error("build {build} is stored in {compression} frames, as a header says, and cannot be read")]
    Compressed {
        /// The build.
        build: BuildId,
        /// How it is compressed.
        compression: Compression,
    },
    /// A header that no device can have.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The runtime was stopped before the operation ran.
    #[error("the runtime was shut down before the operation ran")]
    Shutdown,
}

impl BlockError {
    /// The error for a failed system call; a full disk is told apart from the rest.
    pub fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.to_owned(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace { action, path }
            }
            _ => Self::Io { action, path, source },
        }
    }
}

/// Fails unless `len` bytes at `offset` lie within `size` bytes.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<(), BlockError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, len, size }),
    }
}
