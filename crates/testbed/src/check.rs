//! `testbed self-check`: does /dev/kvm of the machine do what a VMM needs of it? QEMU boots Debian's
//! kernel with it, up to guest-init.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use nidus_vmm::guest::Kernel;
use nidus_vmm::qemu::{Accel, probe};

/// A kernel under KVM under emulation takes about 5 s to come up.
const LIMIT: Duration = Duration::from_secs(90);

/// Options of `testbed self-check`.
#[derive(Args, Debug)]
pub struct Options {
    /// The guest's first process
    #[arg(long)]
    guest_init: PathBuf,
    /// Where a kernel is
    #[arg(long, default_value = "/boot")]
    boot: PathBuf,
}

/// Exits with 0 if KVM booted the kernel.
pub fn run(options: &Options) -> Result<ExitCode> {
    let dir = tempfile::tempdir().context("make a temporary directory")?;
    let image = kernel(&options.boot)?;
    let kernel = Kernel { version: "own".into(), dir: dir.path().to_owned() };
    std::os::unix::fs::symlink(&image, kernel.image()).context("link the kernel")?;
    let initrd = dir.path().join("initrd");
    kernel.write_initramfs(&options.guest_init, &initrd).context("make the guest's initramfs")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let image = kernel.image();
    let probing = probe::kvm(Path::new("qemu-system-x86_64"), &image, &initrd, LIMIT);
    let choice = runtime.context("start a runtime")?.block_on(probing);
    println!("{}", choice.reason);
    Ok(if choice.accel == Accel::Kvm { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kernel(boot: &Path) -> Result<PathBuf> {
    let names = fs::read_dir(boot).with_context(|| format!("read {}", boot.display()))?;
    let found = names.flatten().find(|e| e.file_name().to_string_lossy().starts_with("vmlinuz-"));
    Ok(found.with_context(|| format!("no kernel in {}", boot.display()))?.path())
}
