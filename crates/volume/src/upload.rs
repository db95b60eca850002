//! A file while it is written: beside its place, under a name that no listing shows.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, renameat_with, unlinkat};
use uuid::Uuid;

use crate::store::FILE_MODE;
use crate::{Attributes, VolumeError, VolumePath};

const DRAFT: &str = ".nidus-upload-";

/// A file that is being written. Dropped before its end, nothing of it is left.
#[derive(Debug)]
pub struct Upload {
    dir: OwnedFd,
    path: VolumePath,
    draft: String,
    file: File,
    force: bool,
    written: u64,
    limit: u64,
    done: bool,
}

impl Upload {
    pub(crate) fn is_draft(name: &str) -> bool {
        name.starts_with(DRAFT)
    }

    pub(crate) fn begin(
        dir: OwnedFd,
        path: VolumePath,
        attributes: Attributes,
        force: bool,
        limit: u64,
    ) -> Result<Self, VolumeError> {
        let failed = |e| VolumeError::of("write", &path.text(), e);
        let draft = format!("{DRAFT}{}", Uuid::new_v4().simple());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&dir, draft.as_str(), flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        let (uid, gid) = attributes.owner();
        let set = rustix::fs::fchown(&fd, uid, gid)
            .and_then(|()| rustix::fs::fchmod(&fd, attributes.mode_or(FILE_MODE)));
        let set = set.map_err(failed);
        // From here on the drop removes the draft.
        let upload = Self { dir, path, draft, file: File::from(fd), force, written: 0, limit, done: false };
        set.map(|()| upload)
    }

    /// Appends these bytes.
    ///
    /// # Errors
    /// When the file becomes too large, or the disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), VolumeError> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        if self.written > self.limit {
            return Err(VolumeError::TooMuch { what: self.path.text(), limit: self.limit, unit: "bytes" });
        }
        self.file.write_all(bytes).map_err(|source| match source.raw_os_error() {
            Some(e) if e == rustix::io::Errno::NOSPC.raw_os_error() => VolumeError::NoSpace(self.path.text()),
            _ => VolumeError::Io { action: "write", path: self.path.text(), source },
        })
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// When something has come there meanwhile that is not to be replaced.
    pub fn finish(mut self) -> Result<(), VolumeError> {
        let failed = |e| VolumeError::of("write", &self.path.text(), e);
        self.file.sync_all().map_err(|source| VolumeError::Io {
            action: "write",
            path: self.path.text(),
            source,
        })?;
        let flags = if self.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let dir = self.dir.as_fd();
        renameat_with(dir, self.draft.as_str(), dir, self.path.name(), flags).map_err(failed)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.done {
            let _ = unlinkat(&self.dir, self.draft.as_str(), AtFlags::empty());
        }
    }
}
