//! PID 1 of the guest: loads the few modules, mounts the root disk, switches root, configures
//! the network interface, starts envd and stays to reap what nobody waits for.
//!
//! The initramfs holds this program as `/init`, the modules and `/modules.order`, their paths
//! one a line, after a dash where a guest can do without. Kernel command line: `nidus.probe=1` says so on the console and ends (the
//! host asks whether this kernel runs under its accelerator); `nidus.envd=PATH` names another
//! program than `/usr/bin/envd`.

mod mounts;
mod network;
mod supervise;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::reboot::{RebootMode, reboot};

/// Directory of the initramfs that becomes the root.
const NEW_ROOT: &str = "/newroot";
/// Device of the root disk.
const ROOT_DISK: &str = "/dev/vda";
/// A device that is not there by then will not come.
const DEVICE_LIMIT: Duration = Duration::from_secs(30);

/// What failed, and why: one line on the console.
#[derive(Debug)]
struct Failure(String);

impl Failure {
    fn new(action: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self(format!("cannot {}: {cause}", action.into()))
    }
}

fn main() {
    if std::process::id() != 1 {
        eprintln!("guest-init is the first process of a guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    if let Err(Failure(text)) = start() {
        say(&text);
    }
    // Nothing may go on without its parts: the host sees the VM end and shows the console.
    end();
}

fn start() -> Result<(), Failure> {
    mounts::early()?;
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let option =
        |name: &str| cmdline.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    load_modules()?;
    if option("nidus.probe") == Some("1") {
        say("probe ok");
        end();
    }
    wait_for(Path::new(ROOT_DISK))?;
    mounts::switch_root(ROOT_DISK, NEW_ROOT)?;
    network::up()?;
    let envd = option("nidus.envd").unwrap_or("/usr/bin/envd").to_owned();
    supervise::run(&envd)
}

/// Writes a line to the console, through the kernel's log so that it comes in order. As an error:
/// a kernel that was told to be quiet shows nothing less.
fn say(text: &str) {
    if fs::write("/dev/kmsg", format!("<3>nidus: {text}\n")).is_err() {
        println!("nidus: {text}");
    }
}

/// Ends the VM by a reset, which every VMM is told to take for the end (QEMU's `-no-reboot`).
/// Firecracker has no power to be switched off.
fn end() -> ! {
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    // The first process must not return: the kernel would panic, which is at least an end.
    std::process::exit(1);
}

fn load_modules() -> Result<(), Failure> {
    let order = fs::read_to_string("/modules.order").unwrap_or_default();
    for line in order.lines().filter(|l| !l.is_empty()) {
        let (path, optional) = line.strip_prefix('-').map_or((line, false), |path| (path, true));
        match load(path) {
            Err(Failure(text)) if optional => say(&text),
            loaded => loaded?,
        }
        // What is loaded is a copy. The file would stay in memory, below the root, for as long as the guest runs.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn load(path: &str) -> Result<(), Failure> {
    let file = File::open(path).map_err(|e| Failure::new(format!("open {path}"), e))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(e) => Err(Failure::new(format!("load {path}"), e)),
    }
}

/// Devices come a moment after their driver; devtmpfs has no event to wait for without udev.
fn wait_for(path: &Path) -> Result<(), Failure> {
    let end = Instant::now() + DEVICE_LIMIT;
    while !path.exists() {
        if Instant::now() > end {
            return Err(Failure::new(format!("find {}", path.display()), "no such device after 30 s"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
