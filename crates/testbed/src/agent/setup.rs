//! Modules, devices, network and limits of the machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, setrlimit};

/// What jobs may want, beside what the kernel loads by itself when asked (nftables' expressions, kinds
/// of links). Options are in the image (modprobe.d).
const MODULES: &[&str] = &[
    "9p",
    "9pnet_virtio",
    "fuse",
    "kvm_amd",
    "loop",
    "nbd",
    "nf_tables",
    "overlay",
    "tun",
    "veth",
    "virtio_rng",
];
/// Open files of a process.
const OPEN_FILES: u64 = 1 << 20;
/// A number that no group of the image has; it needs no name.
const KVM_GROUP: u32 = 900;

/// Loads [`MODULES`]. One that does not load is told, not fatal: a test that needs it will say so.
pub fn modules(tell: impl FnOnce(String) -> Result<()>) -> Result<()> {
    let out = Command::new("/sbin/modprobe").arg("-a").args(MODULES).output().context("run modprobe")?;
    if !out.status.success() {
        tell(format!("modprobe: {}", String::from_utf8_lossy(&out.stderr).trim()))?;
    }
    Ok(())
}

/// Access to /dev/kvm for a group, as udev has it; a daemon gives the group to its VMMs. A machine without
/// the device is one in which KVM does not work, which the tests say better.
pub fn kvm_device() -> Result<()> {
    let path = Path::new("/dev/kvm");
    if !path.exists() {
        return Ok(());
    }
    chown(path, None, Some(KVM_GROUP)).context("set the group of /dev/kvm")?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).context("set the mode of /dev/kvm")
}

/// The loopback interface is all the network that there is.
pub fn network() -> Result<()> {
    let out = Command::new("/sbin/ip")
        .args(["link", "set", "lo", "up"])
        .output()
        .context("run ip for the loopback")?;
    if !out.status.success() {
        bail!("cannot bring the loopback interface up: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Open files, and the controllers that groups below the root may use.
pub fn limits() -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).context("raise the limit of open files")?;
    let path = "/sys/fs/cgroup/cgroup.subtree_control";
    fs::write(path, "+cpu +io +memory +pids").with_context(|| format!("write to {path}"))
}
