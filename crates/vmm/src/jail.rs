//! A root file system of a VMM's own: a tmpfs that exists nowhere else.
//!
//! It is made and filled while it is a detached mount, known by nothing but a descriptor. The child
//! attaches it in its own mount namespace and makes it its root (pivot_root(2)); everything else
//! is unmounted there. With the last process and the last descriptor it is gone: no
//! name is left on the host.
//!
//! The process inside is not trusted. Only the directories given to it can be written by it, so that
//! what lies elsewhere is what the daemon put there; what the process has made itself is taken by
//! descriptor once, before a guest runs, and never again by its path (the way could lead out
//! through a symbolic link).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chownat, mkdirat, mknodat, openat, unlinkat};

use crate::mount::{self, Access};
use crate::{Result, VmmError};

/// A place in the jail: a path without a leading slash.
pub(crate) type Inside = &'static CStr;

/// The jail as the daemon holds it.
#[derive(Debug)]
pub(crate) struct Jail {
    root: OwnedFd,
    uid: u32,
    binds: Vec<(OwnedFd, Inside)>,
}

/// What the child needs to enter it.
#[derive(Debug)]
pub struct Entry {
    root: OwnedFd,
    binds: Vec<(OwnedFd, Inside)>,
}

fn failed(action: &str, inside: Inside) -> impl FnOnce(io::Error) -> VmmError {
    let action = format!("{action} /{} in a VMM's jail", inside.to_string_lossy());
    move |e| VmmError::io(action, e)
}

impl Jail {
    /// An empty one for the user `uid`, of at most `bytes` in 64 files.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or on a kernel older than 5.12.
    pub fn new(uid: u32, bytes: u64) -> Result<Self> {
        let root = mount::tmpfs(bytes, 64).map_err(|e| VmmError::io("make a VMM's jail (a tmpfs)", e))?;
        Ok(Self { root, uid, binds: Vec::new() })
    }

    /// A directory of root's.
    pub fn dir(&self, inside: Inside) -> Result<()> {
        mkdirat(&self.root, inside, Mode::from(0o755)).map_err(|e| failed("make", inside)(e.into()))
    }

    /// A directory that the process may write to.
    pub fn own_dir(&self, inside: Inside) -> Result<()> {
        self.dir(inside)?;
        self.give(inside, self.uid)
    }

    fn give(&self, inside: Inside, uid: u32) -> Result<()> {
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
        chownat(&self.root, inside, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed("change the owner of", inside)(e.into()))
    }

    /// Takes a directory back: the process can make nothing new in it.
    pub fn take_back(&self, inside: Inside) -> Result<()> {
        self.give(inside, 0)
    }

    /// A device node with the numbers of the host's `device`, for the process alone.
    pub fn device(&self, inside: Inside, device: &Path) -> Result<()> {
        let wrap = |e| VmmError::io(format!("look at the device {}", device.display()), e);
        let meta = std::fs::metadata(device).map_err(wrap)?;
        let kind = if meta.file_type().is_block_device() {
            FileType::BlockDevice
        } else if meta.file_type().is_char_device() {
            FileType::CharacterDevice
        } else {
            return Err(wrap(io::Error::new(io::ErrorKind::InvalidInput, "it is no device")));
        };
        mknodat(&self.root, inside, kind, Mode::from(0o600), meta.rdev())
            .map_err(|e| failed("make", inside)(e.into()))?;
        self.give(inside, self.uid)
    }

    /// As [`Jail::device`], when the host has it.
    pub fn optional_device(&self, inside: Inside, device: &Path) -> Result<()> {
        if device.exists() { self.device(inside, device) } else { Ok(()) }
    }

    /// A named pipe that the process writes to; the daemon's end, which does not block.
    pub fn pipe(&self, inside: Inside) -> Result<File> {
        mknodat(&self.root, inside, FileType::Fifo, Mode::from(0o600), 0)
            .map_err(|e| failed("make", inside)(e.into()))?;
        self.give(inside, self.uid)?;
        // Open for both, so that it never ends and a writer never waits.
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.path(inside))
            .map_err(failed("open", inside))
    }

    /// A new, empty file that belongs to the process, in place of any other; the daemon's handle
    /// on it.
    pub fn own_file(&self, inside: Inside) -> Result<File> {
        // Left by an exchange that was cancelled.
        let _ = self.remove(inside);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.root, inside, flags, Mode::from(0o600))
            .map_err(|e| failed("make", inside)(e.into()))?;
        self.give(inside, self.uid)?;
        Ok(file.into())
    }

    /// Removes a file that the daemon made.
    pub fn remove(&self, inside: Inside) -> Result<()> {
        unlinkat(&self.root, inside, AtFlags::empty()).map_err(|e| failed("remove", inside)(e.into()))
    }

    /// Binds an open file of the host when the process starts.
    pub fn bind(&mut self, inside: Inside, file: &File, access: Access) -> Result<()> {
        let tree = mount::bind(file, access).map_err(failed("bind", inside))?;
        self.place(inside)?;
        self.binds.push((tree, inside));
        Ok(())
    }

    /// An empty file of root's to bind something onto.
    pub fn place(&self, inside: Inside) -> Result<()> {
        mknodat(&self.root, inside, FileType::RegularFile, Mode::from(0o600), 0)
            .map_err(|e| failed("make", inside)(e.into()))
    }

    /// Binds an open file of the host while the process runs; `namespace` is its mount namespace.
    /// Blocks.
    pub fn attach(&self, namespace: &File, inside: Inside, file: &File, access: Access) -> Result<()> {
        let work = || {
            let tree = mount::bind(file, access)?;
            let root = self.root.try_clone()?;
            mount::inside(namespace, move || mount::attach(tree.as_raw_fd(), root.as_raw_fd(), inside))
        };
        work().map_err(failed("bind", inside))
    }

    /// Undoes [`Jail::attach`]. Blocks.
    pub fn detach(&self, namespace: &File, inside: Inside) -> Result<()> {
        let work = || {
            let root = self.root.try_clone()?;
            mount::inside(namespace, move || {
                // SAFETY: the file is open; the thread has a working directory of its own.
                let r = unsafe { libc::fchdir(root.as_raw_fd()) };
                if r != 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: a constant string.
                let r = unsafe { libc::umount2(inside.as_ptr(), libc::MNT_DETACH) };
                if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            })
        };
        work().map_err(failed("unmount", inside))
    }

    /// A path by which the daemon reaches something in the jail, as long as `self` lives. Only for what
    /// the daemon made: see the module's text.
    pub fn path(&self, inside: Inside) -> PathBuf {
        Path::new("/proc/self/fd").join(self.root.as_raw_fd().to_string()).join(&*inside.to_string_lossy())
    }

    /// A handle on a socket that the process made, if it is there: to be connected to by its
    /// descriptor, wherever its name may lead to later.
    pub fn socket(&self, inside: Inside) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.root, inside, flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no socket"));
        }
        Ok(fd)
    }

    /// A socket of the daemon's that the process may connect to. Must be called on the runtime.
    pub fn listen(&self, inside: Inside) -> Result<tokio::net::UnixListener> {
        let listener =
            tokio::net::UnixListener::bind(self.path(inside)).map_err(failed("listen on", inside))?;
        self.give(inside, self.uid)?;
        Ok(listener)
    }

    /// What the child needs; can be taken once.
    pub fn entry(&mut self) -> Result<Entry> {
        let root = self.root.try_clone().map_err(|e| VmmError::io("duplicate a descriptor", e))?;
        Ok(Entry { root, binds: std::mem::take(&mut self.binds) })
    }
}

impl Entry {
    /// Makes the jail the calling process's root. For a child between fork and exec: it
    /// allocates nothing and makes nothing but system calls.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let check = |r: libc::c_long| if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        let root: RawFd = self.root.as_raw_fd();
        let null = std::ptr::null::<libc::c_char>;
        // SAFETY: system calls on constant strings and open descriptors.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS).into())?;
            // Nothing that is mounted from here on comes back to the host.
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(libc::mount(null(), c"/".as_ptr(), null(), private, std::ptr::null()).into())?;
        }
        // Any directory does: it is unmounted with the rest of the old root.
        mount::attach(root, libc::AT_FDCWD, c"/proc")?;
        for (tree, inside) in &self.binds {
            mount::attach(tree.as_raw_fd(), root, inside)?;
        }
        // SAFETY: as above.
        unsafe {
            check(libc::fchdir(root).into())?;
            // The old root comes to lie on the new one and is taken off it (pivot_root(2), "pivot_root(".", ".")").
            check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
            check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
            check(libc::chdir(c"/".as_ptr()).into())
        }
    }
}
