//! From the initramfs to a machine with its file systems in place.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use crate::protocol::{SPEC_FILE, Share};

const DISK: &str = "/dev/vda";
const NEW_ROOT: &str = "/root";
/// A device that is not there by then will not come.
const DEVICE_LIMIT: Duration = Duration::from_secs(30);

/// Loads the early modules and changes to the root disk. This program and the specification go along,
/// to /run.
pub fn prepare() -> Result<()> {
    let none = MsFlags::empty();
    at("devtmpfs", "/dev", "devtmpfs", none, "mode=0755")?;
    at("proc", "/proc", "proc", none, "")?;
    at("sysfs", "/sys", "sysfs", none, "")?;
    early_modules()?;
    wait_for(DISK)?;
    at(DISK, NEW_ROOT, "ext4", MsFlags::MS_NOATIME, "")?;
    let run = format!("{NEW_ROOT}/run");
    at("tmpfs", &run, "tmpfs", none, "mode=0755")?;
    for (from, to) in [("/init", "testbed"), (&format!("/{SPEC_FILE}"), SPEC_FILE)] {
        fs::copy(from, format!("{run}/{to}")).with_context(|| format!("copy {from}"))?;
        // The initramfs is memory.
        fs::remove_file(from).with_context(|| format!("remove {from}"))?;
    }
    for dir in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{dir}"), format!("{NEW_ROOT}/{dir}"));
        mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("move {from}"))?;
    }
    chdir(NEW_ROOT).context("enter the root disk")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root disk")?;
    chroot(".").context("change the root")?;
    chdir("/").context("enter the new root")?;
    at("devpts", "/dev/pts", "devpts", none, "gid=5,mode=0620,ptmxmode=0666")?;
    at("tmpfs", "/dev/shm", "tmpfs", none, "mode=1777")?;
    at("cgroup2", "/sys/fs/cgroup", "cgroup2", none, "")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).with_context(|| format!("link {link}"))?;
    }
    nix::unistd::sethostname("testbed").context("set the host name")
}

fn at(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("mount {source} at {target}"))
}

fn early_modules() -> Result<()> {
    let order = fs::read_to_string("/modules/order").context("read the list of early modules")?;
    for path in order.lines() {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(e) => return Err(e).with_context(|| format!("load {path}")),
        }
    }
    Ok(())
}

/// The device whose path begins so. Devices come a moment after their driver, and without udev there is
/// no event for it.
pub fn wait_for(prefix: &str) -> Result<PathBuf> {
    let end = Instant::now() + DEVICE_LIMIT;
    loop {
        let devices = fs::read_dir("/dev").context("read /dev")?;
        let mut paths = devices.flatten().map(|e| e.path());
        if let Some(path) = paths.find(|p| p.to_string_lossy().starts_with(prefix)) {
            return Ok(path);
        }
        if Instant::now() > end {
            bail!("no device {prefix} appeared within {} s", DEVICE_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Mounts the share with this number.
pub fn share(number: usize, share: &Share) -> Result<()> {
    let target = share.guest.display().to_string();
    // What cannot change may be cached, so that programs start fast and are read once.
    let (flags, cache) = match share.read_only {
        true => (MsFlags::MS_RDONLY, "loose"),
        false => (MsFlags::empty(), "mmap"),
    };
    let options = format!("trans=virtio,version=9p2000.L,msize=524288,cache={cache}");
    at(&format!("share{number}"), &target, "9p", flags, &options)
}
