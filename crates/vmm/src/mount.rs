//! Mounts by file descriptor (fsopen(2), fsmount(2), open_tree(2), move_mount(2),
//! mount_setattr(2); Linux 5.12): they have no name on the host until they are moved somewhere.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, open_tree,
};

/// A new tmpfs of at most `bytes` in at most `inodes` files; nothing in it can be run, device
/// nodes work. The descriptor is its root directory.
pub fn tmpfs(bytes: u64, inodes: u32) -> io::Result<OwnedFd> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"size", bytes.to_string())?;
    fsconfig_set_string(&context, c"nr_inodes", inodes.to_string())?;
    fsconfig_set_string(&context, c"mode", c"0755")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// How a file is bound somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It can be run.
    Run,
    /// It can be read.
    Read,
    /// It can be read and written.
    Write,
}

/// A bind mount of an open file, not attached anywhere yet.
pub fn bind(file: &File, access: Access) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(file.as_fd(), c"", flags)?;
    let set = libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | match access {
            Access::Run => libc::MOUNT_ATTR_RDONLY,
            Access::Read => libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC,
            Access::Write => libc::MOUNT_ATTR_NOEXEC,
        };
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty constant string; the structure lives across the call and its
    // size is told.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            mem::size_of_val(&attributes),
        )
    };
    if r == 0 { Ok(tree) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a detached mount onto `path`, below the directory `at`. Makes no more than one
/// system call and allocates nothing, so that a child may use it between fork and exec.
pub fn attach(mount: RawFd, at: RawFd, path: &CStr) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    // SAFETY: both strings live across the call.
    let r = unsafe {
        libc::syscall(libc::SYS_move_mount, mount, c"".as_ptr(), at, path.as_ptr(), MOVE_MOUNT_F_EMPTY_PATH)
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs `work` on a thread of its own inside a mount namespace.
pub fn inside<T: Send + 'static>(
    namespace: &File,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = namespace.try_clone()?;
    let thread = std::thread::Builder::new().name("mount".into()).spawn(move || {
        // SAFETY: only this thread, which ends with the work, gets its own root and namespace.
        if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; the file is open.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        work()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}
