//! A FUSE mount that has no place in any directory (Documentation/filesystems/fuse/fuse.rst, fsopen(2)).

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags, open},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    },
    process::{getegid, geteuid},
};

use crate::MemFsError;

/// The server's side, and the mount's.
pub fn mount() -> Result<(OwnedFd, OwnedFd), MemFsError> {
    // First of all: this loads the kernel's module, which makes /dev/fuse.
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(MemFsError::mount("make"))?;
    let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let device = device.map_err(MemFsError::mount("open /dev/fuse for"))?;
    let configure = MemFsError::mount("configure");
    let (user, group) = (geteuid().as_raw().to_string(), getegid().as_raw().to_string());
    let number = device.as_raw_fd().to_string();
    let options = [
        ("fd", &*number),
        ("rootmode", "40555"),
        ("user_id", &*user),
        ("group_id", &*group),
        ("source", "nidus"),
    ];
    for (key, value) in options {
        fsconfig_set_string(&context, key, value).map_err(&configure)?;
    }
    // VMMs have users of their own; the kernel checks the modes.
    for flag in ["allow_other", "default_permissions"] {
        fsconfig_set_flag(&context, flag).map_err(&configure)?;
    }
    fsconfig_create(&context).map_err(MemFsError::mount("create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes);
    Ok((device, mount.map_err(MemFsError::mount("mount"))?))
}
