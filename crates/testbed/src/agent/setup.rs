//! Modules, network and limits of the machine.

use std::fs;
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

/// Loads [`MODULES`]. One that does not load is told, not fatal: a test that needs it will say so.
pub fn modules(tell: impl FnOnce(String) -> Result<()>) -> Result<()> {
    let out = Command::new("/sbin/modprobe").arg("-a").args(MODULES).output().context("run modprobe")?;
    if !out.status.success() {
        tell(format!("modprobe: {}", String::from_utf8_lossy(&out.stderr).trim()))?;
    }
    Ok(())
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
