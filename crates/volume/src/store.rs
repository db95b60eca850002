//! The volumes of a node.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid, chmod, chownat, mkdirat,
    openat2, readlinkat, statx, unlinkat,
};
use rustix::io::Errno;
use uuid::Uuid;

use crate::{Upload, VolumeError, VolumePath};

/// Bits of a mode that are kept: a file that takes its owner's rights has none to take here.
const MODE_BITS: u32 = 0o1777;
pub(crate) const FILE_MODE: u32 = 0o644;
const DIR_MODE: u32 = 0o755;

/// What one volume may have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a file.
    pub file_bytes: u64,
    /// Entries of one listing.
    pub entries: usize,
    /// Levels of one listing.
    pub depth: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { file_bytes: 16 << 30, entries: 100_000, depth: 64 }
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a pipe or a socket.
    Other,
}

/// What is at a path.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Last name of the path.
    pub name: String,
    /// From the volume's root.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permissions, without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When it was read last.
    pub accessed: DateTime<Utc>,
    /// When its content changed last.
    pub modified: DateTime<Utc>,
    /// When it was made, where the file system knows, or else when it changed last in any way.
    pub created: DateTime<Utc>,
    /// Where a symbolic link leads.
    pub target: Option<String>,
}

/// Owner and mode of something new, or to be changed; none is as it is, or by default root's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

impl Attributes {
    pub(crate) fn mode_or(&self, default: u32) -> Mode {
        Mode::from_raw_mode(self.mode.unwrap_or(default) & MODE_BITS)
    }

    pub(crate) fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        // All ones is what the system takes for "as it is".
        let uid = self.uid.filter(|u| *u != u32::MAX).map(Uid::from_raw);
        (uid, self.gid.filter(|g| *g != u32::MAX).map(Gid::from_raw))
    }
}

/// A directory that has a directory for each volume.
#[derive(Debug)]
pub struct Volumes {
    root: PathBuf,
    limits: Limits,
}

fn time(seconds: i64, nanos: u32) -> DateTime<Utc> {
    DateTime::from_timestamp(seconds, nanos).unwrap_or_default()
}

impl Volumes {
    /// Opens the directory, or makes it, for root alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: PathBuf, limits: Limits) -> std::io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&root)?;
        Ok(Self { root, limits })
    }

    /// 32 random bytes that stay the same for as long as the volumes do: they sign the handles of files by which guests
    /// that were paused find them again.
    ///
    /// # Errors
    /// When the file with them cannot be read or made.
    pub fn handle_key(&self) -> io::Result<[u8; 32]> {
        let path = self.root.join("handles.key");
        match std::fs::read(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{} has not 32 bytes", path.display()))
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut bytes = [0; 32];
                getrandom::fill(&mut bytes).map_err(io::Error::other)?;
                // Whole or not at all; one daemon at a time is here.
                let draft = path.with_extension("new");
                let _ = std::fs::remove_file(&draft);
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
                file.write_all(&bytes)?;
                file.sync_all()?;
                std::fs::rename(&draft, &path)?;
                Ok(bytes)
            }
            Err(e) => Err(e),
        }
    }

    fn path_of(&self, id: Uuid) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// Makes a volume, for all users of the guests that mount it; one that is there already stays as it is.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn create(&self, id: Uuid) -> Result<(), VolumeError> {
        let path = self.path_of(id);
        let failed = |source| VolumeError::Io { action: "make the volume", path: id.to_string(), source };
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            made => {
                made.map_err(failed)?;
                // Whatever the process's umask is.
                std::fs::set_permissions(&path, Permissions::from_mode(0o777)).map_err(failed)
            }
        }
    }

    /// Deletes a volume with all that is in it. It is gone for all others at once.
    ///
    /// # Errors
    /// When there is none of this id, or the file system fails.
    pub fn delete(&self, id: Uuid) -> Result<(), VolumeError> {
        let failed = |source| VolumeError::Io { action: "delete the volume", path: id.to_string(), source };
        let aside = format!("{}.deleted", Uuid::new_v4());
        match std::fs::rename(self.path_of(id), self.root.join(&aside)) {
            Ok(()) => self.remove_aside(&aside).map_err(failed),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(VolumeError::NoVolume(id.to_string())),
            Err(e) => Err(failed(e)),
        }
    }

    /// Guests make trees of any depth.
    fn remove_aside(&self, name: &str) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.root, flags, Mode::empty())?;
        Ok(remove_tree(root.as_fd(), name)?)
    }

    /// Removes what deletions that were cut off have left.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn reclaim(&self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(&self.root)? {
            // Names of ours: an id and an ending.
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".deleted") {
                self.remove_aside(&name)?;
            }
        }
        Ok(())
    }

    /// Where a volume's files are.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn directory(&self, id: Uuid) -> Result<OwnedFd, VolumeError> {
        let path: &Path = &self.path_of(id);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT => VolumeError::NoVolume(id.to_string()),
            e => VolumeError::of("open the volume", &id.to_string(), e),
        })
    }

    /// What is at a path; with `follow`, what a link there leads to.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn stat(&self, id: Uuid, path: &VolumePath, follow: bool) -> Result<Entry, VolumeError> {
        let volume = self.directory(id)?;
        let flags = if follow { OFlags::PATH } else { OFlags::PATH | OFlags::NOFOLLOW };
        let fd = open_in(volume.as_fd(), path, flags, "look at")?;
        entry(fd.as_fd(), path)
    }

    /// What is in a directory, and in those in it, so many levels deep.
    ///
    /// # Errors
    /// When it is not a directory, or has too many entries.
    pub fn list(&self, id: Uuid, path: &VolumePath, depth: u32) -> Result<Vec<Entry>, VolumeError> {
        if depth == 0 || depth > self.limits.depth {
            return Err(VolumeError::Depth(depth, self.limits.depth));
        }
        let volume = self.directory(id)?;
        let fd = open_in(volume.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY, "list")?;
        let mut all = Vec::new();
        self.list_into(fd.as_fd(), path, depth, &mut all)?;
        Ok(all)
    }

    fn list_into(
        &self,
        dir: BorrowedFd<'_>,
        path: &VolumePath,
        depth: u32,
        all: &mut Vec<Entry>,
    ) -> Result<(), VolumeError> {
        let text = path.text();
        let failed = |e| VolumeError::of("list", &text, e);
        let mut names = Vec::new();
        for found in Dir::read_from(dir).map_err(failed)? {
            let name = found.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." && !Upload::is_draft(&name) {
                names.push(name);
            }
            if all.len() + names.len() > self.limits.entries {
                let limit = self.limits.entries as u64;
                return Err(VolumeError::TooMuch { what: text, limit, unit: "entries" });
            }
        }
        names.sort();
        for name in names {
            // What goes meanwhile was not there, and neither is what no client's path can name.
            let Ok(below) = VolumePath::parse(&format!("{text}/{name}")) else { continue };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = match rustix::fs::openat(dir, name.as_str(), flags, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(failed(e)),
            };
            let found = entry(fd.as_fd(), &below)?;
            let deeper = found.kind == Kind::Directory && depth > 1;
            all.push(found);
            if deeper {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(dir, name.as_str(), flags, Mode::empty()) {
                    Ok(fd) => self.list_into(fd.as_fd(), &below, depth - 1, all)?,
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                    Err(e) => return Err(failed(e)),
                }
            }
        }
        Ok(())
    }

    /// Makes a directory. With `parents`, those above it too, and one that is there already is as good.
    ///
    /// # Errors
    /// When something is there already, or what it is to be in is not there.
    pub fn make_dir(
        &self,
        id: Uuid,
        path: &VolumePath,
        attributes: Attributes,
        parents: bool,
    ) -> Result<Entry, VolumeError> {
        let volume = self.directory(id)?;
        let Some(parent) = path.parent() else {
            return if parents { self.stat(id, path, true) } else { Err(VolumeError::Exists(path.text())) };
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let dir = match open_in(volume.as_fd(), &parent, flags, "make") {
            Err(VolumeError::NotFound(_)) if parents => {
                self.make_dir(id, &parent, attributes, true)?;
                open_in(volume.as_fd(), &parent, flags, "make")?
            }
            other => other?,
        };
        let failed = |e| VolumeError::of("make", &path.text(), e);
        match mkdirat(&dir, path.name(), Mode::RWXU) {
            Ok(()) => set(dir.as_fd(), path, attributes, attributes.mode_or(DIR_MODE))?,
            Err(Errno::EXIST) if parents => {
                let known = self.stat(id, path, true)?;
                if known.kind != Kind::Directory {
                    return Err(VolumeError::Exists(path.text()));
                }
            }
            Err(e) => return Err(failed(e)),
        }
        self.stat(id, path, true)
    }

    /// A file to read, and its size in bytes.
    ///
    /// # Errors
    /// When it is not a file.
    pub fn read(&self, id: Uuid, path: &VolumePath) -> Result<(File, u64), VolumeError> {
        let volume = self.directory(id)?;
        // Not blocking: a pipe must not hold up who opens it.
        let fd = open_in(volume.as_fd(), path, OFlags::RDONLY | OFlags::NONBLOCK, "read")?;
        let file = File::from(fd);
        let about = file.metadata();
        let about = about.map_err(|source| VolumeError::Io { action: "read", path: path.text(), source })?;
        if !about.is_file() {
            return Err(VolumeError::NotAFile(path.text()));
        }
        Ok((file, about.len()))
    }

    /// Begins to write a file. It is there, whole, when the upload is finished. With `force`, in the place of
    /// one that is there already.
    ///
    /// # Errors
    /// When something else is there, or what it is to be in is not.
    pub fn write(
        &self,
        id: Uuid,
        path: &VolumePath,
        attributes: Attributes,
        force: bool,
    ) -> Result<Upload, VolumeError> {
        let parent = path.parent().ok_or_else(|| VolumeError::NotAFile(path.text()))?;
        match self.stat(id, path, false) {
            Ok(known) if known.kind == Kind::Directory => return Err(VolumeError::Exists(path.text())),
            Ok(_) if !force => return Err(VolumeError::Exists(path.text())),
            Ok(_) | Err(VolumeError::NotFound(_)) => {}
            Err(e) => return Err(e),
        }
        let volume = self.directory(id)?;
        let dir = open_in(volume.as_fd(), &parent, OFlags::PATH | OFlags::DIRECTORY, "write to")?;
        Upload::begin(dir, path.clone(), attributes, force, self.limits.file_bytes)
    }

    /// Removes what is at a path; a directory with all that is in it.
    ///
    /// # Errors
    /// When nothing is there, or it is the root.
    pub fn remove(&self, id: Uuid, path: &VolumePath) -> Result<(), VolumeError> {
        let parent = path.parent().ok_or(VolumeError::Root)?;
        let volume = self.directory(id)?;
        let dir = open_in(volume.as_fd(), &parent, OFlags::PATH | OFlags::DIRECTORY, "remove")?;
        let failed = |e| VolumeError::of("remove", &path.text(), e);
        match unlinkat(&dir, path.name(), AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            done => return done.map_err(failed),
        }
        remove_tree(dir.as_fd(), path.name()).map_err(failed)
    }

    /// Changes owner and mode.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn update(&self, id: Uuid, path: &VolumePath, attributes: Attributes) -> Result<Entry, VolumeError> {
        let volume = self.directory(id)?;
        let known = self.stat(id, path, false)?;
        match path.parent() {
            Some(parent) => {
                let dir = open_in(volume.as_fd(), &parent, OFlags::PATH | OFlags::DIRECTORY, "change")?;
                set(dir.as_fd(), path, attributes, attributes.mode_or(known.mode))?;
            }
            None => {
                let failed = |e| VolumeError::of("change", "/", e);
                let fd = open_in(volume.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY, "change")?;
                let (uid, gid) = attributes.owner();
                rustix::fs::fchown(&fd, uid, gid).map_err(failed)?;
                rustix::fs::fchmod(&fd, attributes.mode_or(known.mode)).map_err(failed)?;
            }
        }
        self.stat(id, path, false)
    }
}

/// Opens a path of a volume; no link on it leads out.
fn open_in(
    volume: BorrowedFd<'_>,
    path: &VolumePath,
    flags: OFlags,
    action: &'static str,
) -> Result<OwnedFd, VolumeError> {
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(volume, path.relative(), flags | OFlags::CLOEXEC, Mode::empty(), inside)
        .map_err(|e| VolumeError::of(action, &path.text(), e))
}

/// Sets owner and mode of a name in a directory; those of a link itself, not of where it leads.
fn set(
    dir: BorrowedFd<'_>,
    path: &VolumePath,
    attributes: Attributes,
    mode: Mode,
) -> Result<(), VolumeError> {
    let failed = |e| VolumeError::of("change", &path.text(), e);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, path.name(), flags, Mode::empty()).map_err(failed)?;
    let (uid, gid) = attributes.owner();
    chownat(&fd, "", uid, gid, AtFlags::EMPTY_PATH).map_err(failed)?;
    // The one way to change the mode of what a descriptor without rights stands for (before Linux 6.6).
    match chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), mode) {
        // Links have no mode.
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(e) => Err(failed(e)),
    }
}

fn entry(fd: BorrowedFd<'_>, path: &VolumePath) -> Result<Entry, VolumeError> {
    let failed = |e| VolumeError::of("look at", &path.text(), e);
    let s =
        statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME).map_err(failed)?;
    let kind = match FileType::from_raw_mode(s.stx_mode.into()) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Other,
    };
    let target = match kind {
        Kind::Symlink => Some(readlinkat(fd, "", Vec::new()).map_err(failed)?.to_string_lossy().into_owned()),
        _ => None,
    };
    let born = s.stx_mask & StatxFlags::BTIME.bits() != 0;
    let created = if born { s.stx_btime } else { s.stx_ctime };
    Ok(Entry {
        name: path.name().to_owned(),
        path: path.text(),
        kind,
        size: if kind == Kind::Directory { 0 } else { s.stx_size },
        mode: u32::from(s.stx_mode) & 0o7777,
        uid: s.stx_uid,
        gid: s.stx_gid,
        accessed: time(s.stx_atime.tv_sec, s.stx_atime.tv_nsec),
        modified: time(s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
        created: time(created.tv_sec, created.tv_nsec),
        target,
    })
}

/// Removes a directory and all in it, by descriptors: what is renamed meanwhile leads nowhere else. Goes
/// down level by level by moving what is below up, so that no depth costs descriptors or stack.
fn remove_tree(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    loop {
        let mut left = false;
        let names: Vec<_> = Dir::read_from(&top)?
            .filter_map(Result::ok)
            .map(|e| e.file_name().to_owned())
            .filter(|n| n.as_bytes() != b"." && n.as_bytes() != b"..")
            .collect();
        for name in names {
            match unlinkat(&top, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(e) => return Err(e),
            }
            if unlinkat(&top, &name, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            // What is in it comes up to here, under names of its own, and goes in the next round.
            left = true;
            let below = rustix::fs::openat(&top, &name, flags, Mode::empty())?;
            for inner in Dir::read_from(&below)? {
                let inner = inner?.file_name().to_owned();
                if inner.as_bytes() == b"." || inner.as_bytes() == b".." {
                    continue;
                }
                let up = format!(".{}", Uuid::new_v4().simple());
                rustix::fs::renameat(&below, &inner, &top, up)?;
            }
        }
        if !left {
            return unlinkat(parent, name, AtFlags::REMOVEDIR);
        }
    }
}

#[cfg(test)]
mod tests;
