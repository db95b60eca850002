//! File systems of the guest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use crate::Failure;

fn at(source: &str, target: &str, kind: &str, flags: MsFlags, options: Option<&str>) -> Result<(), Failure> {
    fs::create_dir_all(target).map_err(|e| Failure::new(format!("make {target}"), e))?;
    mount(Some(source), target, Some(kind), flags, options)
        .map_err(|e| Failure::new(format!("mount {kind} at {target}"), e))
}

/// Flags of file systems that hold neither devices nor programs with rights.
fn plain() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV
}

/// What is needed before there is a root disk.
pub fn early() -> Result<(), Failure> {
    at("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=0755"))?;
    at("proc", "/proc", "proc", plain() | MsFlags::MS_NOEXEC, None)?;
    at("sysfs", "/sys", "sysfs", plain() | MsFlags::MS_NOEXEC, None)
}

/// Mounts the root disk, moves the early mounts onto it, makes it the root, and mounts the rest.
pub fn switch_root(disk: &str, new_root: &str) -> Result<(), Failure> {
    at(disk, new_root, "ext4", MsFlags::MS_NOATIME, Some("discard"))?;
    for dir in ["dev", "proc", "sys"] {
        let target = format!("{new_root}/{dir}");
        fs::create_dir_all(&target).map_err(|e| Failure::new(format!("make {target}"), e))?;
        let from = format!("/{dir}");
        mount(Some(from.as_str()), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|e| Failure::new(format!("move {from}"), e))?;
    }
    // The initramfs stays underneath, empty of anything but this program and some modules
    // (switch_root(8) does the same; a tmpfs root cannot be unmounted).
    chdir(new_root).map_err(|e| Failure::new(format!("enter {new_root}"), e))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|e| Failure::new("move the root disk to /", e))?;
    chroot(".").map_err(|e| Failure::new("change the root", e))?;
    chdir("/").map_err(|e| Failure::new("enter /", e))?;
    at(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("gid=5,mode=0620,ptmxmode=0666"),
    )?;
    at("tmpfs", "/dev/shm", "tmpfs", plain(), Some("mode=1777"))?;
    at("tmpfs", "/run", "tmpfs", plain(), Some("mode=0755"))?;
    fs::create_dir_all("/run/lock").map_err(|e| Failure::new("make /run/lock", e))?;
    cgroups();
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ] {
        if link == "/dev/ptmx" {
            // The node of devtmpfs belongs to root alone in some kernels; this one is the guest's.
            let _ = fs::remove_file(link);
        }
        if !Path::new(link).exists() {
            symlink(target, link).map_err(|e| Failure::new(format!("link {link}"), e))?;
        }
    }
    if let Ok(name) = fs::read_to_string("/etc/hostname") {
        nix::unistd::sethostname(name.trim()).map_err(|e| Failure::new("set the host name", e))?;
    }
    Ok(())
}

/// A guest without control groups works too, so this may fail.
fn cgroups() {
    let flags = plain() | MsFlags::MS_NOEXEC;
    let _ = at("cgroup2", "/sys/fs/cgroup", "cgroup2", flags, None);
}
