//! A volume as a guest may have it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fstat, fstatvfs, openat};
use uuid::Uuid;

use crate::handle::{self, HandleKey};
use crate::status::{Result, Status};

/// What a guest may do to the disk that a volume is on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a file.
    pub file_bytes: u64,
    /// Bytes that stay free on the node's disk: when fewer are, nothing is written.
    pub free_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { file_bytes: 16 << 30, free_bytes: 1 << 30 }
    }
}

/// Why a volume cannot be exported.
#[derive(Debug, thiserror::Error)]
#[error(
    "the volume's files have no lasting handles ({0}): its directory must be on a file system that can be exported, \
     such as ext4, xfs or btrfs"
)]
pub struct OpenError(#[source] std::io::Error);

/// A volume that one sandbox has mounted.
#[derive(Debug)]
pub struct Export {
    name: String,
    root: File,
    root_handle: Vec<u8>,
    device: u64,
    root_inode: u64,
    key: HandleKey,
    pub(crate) file_system: u64,
    pub(crate) limits: Limits,
}

impl Export {
    /// Of the volume `id`, whose directory `directory` stands for.
    ///
    /// # Errors
    /// When its file system knows no handles.
    pub fn new(
        id: Uuid,
        directory: &OwnedFd,
        node: &HandleKey,
        limits: Limits,
    ) -> std::result::Result<Self, OpenError> {
        let open = || {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root: File = openat(directory, ".", flags, Mode::empty())?.into();
            let stat = fstat(&root)?;
            Ok::<_, rustix::io::Errno>((root, stat))
        };
        let (root, stat) = open().map_err(|e| OpenError(e.into()))?;
        let key = node.of_volume(id);
        let try_handle = || {
            let made = handle::encode(&key, &root)?;
            handle::open(&key, &root, &made)?;
            Ok::<_, Status>(made)
        };
        let root_handle = try_handle().map_err(|s| OpenError(std::io::Error::other(format!("{s:?}"))))?;
        Ok(Self {
            name: format!("/{id}"),
            root_handle,
            device: stat.st_dev,
            root_inode: stat.st_ino,
            file_system: key.file_system(),
            root,
            key,
            limits,
        })
    }

    /// What a guest mounts it by: a slash and its id.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn root_handle(&self) -> &[u8] {
        &self.root_handle
    }

    /// What a handle names. As root.
    pub(crate) fn open(&self, handle: &[u8]) -> Result<OwnedFd> {
        let fd = handle::open(&self.key, &self.root, handle)?;
        // A file that has gone may still be open here and there.
        if fstat(&fd)?.st_nlink == 0 { Err(Status::Stale) } else { Ok(fd) }
    }

    pub(crate) fn handle_of(&self, fd: impl AsFd) -> Result<Vec<u8>> {
        handle::encode(&self.key, fd)
    }

    pub(crate) fn is_root(&self, fd: impl AsFd) -> Result<bool> {
        let stat = fstat(fd)?;
        Ok((stat.st_dev, stat.st_ino) == (self.device, self.root_inode))
    }

    pub(crate) fn root_inode(&self) -> u64 {
        self.root_inode
    }

    pub(crate) fn root(&self) -> &File {
        &self.root
    }

    /// What is in a directory under a name; above the root is the root.
    pub(crate) fn look_up(&self, dir: impl AsFd, name: &[u8]) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let up = name == b".." && self.is_root(&dir)?;
        let found = openat(dir, if up { b"." } else { name }, flags, Mode::empty())?;
        // Whatever may be mounted there is none of the volume.
        if fstat(&found)?.st_dev == self.device { Ok(found) } else { Err(Status::XDev) }
    }

    /// # Errors
    /// When the node's disk is too full for more.
    pub(crate) fn expect_room(&self) -> Result<()> {
        let disk = fstatvfs(&self.root)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        // Of files, one in a hundred stays for the node; some file systems make them as they are needed.
        let no_files = disk.f_files > 0 && disk.f_favail < disk.f_files / 100;
        if free < self.limits.free_bytes || no_files { Err(Status::NoSpc) } else { Ok(()) }
    }
}
