//! Making the image. Nothing is mounted and nothing is installed on the host: mmdebstrap fills a
//! directory, mke2fs writes it as a file system.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{modules, tool};

/// Increased when the steps below change what the image holds.
const VERSION: &str = "2";
/// Debian's release in the machine.
const SUITE: &str = "bookworm";
/// It has a newer QEMU than the release.
const BACKPORTS: &str = "bookworm-backports";
/// What comes from there: QEMU 8.2 is the oldest that the QEMU driver takes, and the kernel is the one
/// of Debian's next release.
const FROM_BACKPORTS: &str = "qemu-* seabios ipxe-qemu linux-image-*";
/// The release and its backports that have the QEMU which emulates the machine: see docs/adr/0017.
const EMULATOR_SUITE: &str = "trixie";
const EMULATOR_BACKPORTS: &str = "trixie-backports";
const EMULATOR_PACKAGES: &[&str] = &["qemu-system-x86", "seabios"];
/// Everything that runs in the machine beside our own static programs.
const PACKAGES: &[&str] = &[
    "linux-image-amd64",
    "ca-certificates",
    "curl",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "nftables",
    "procps",
    "python3",
    "python3-venv",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
];
/// Modules' options, as a file of modprobe.d(5).
const MODULE_OPTIONS: &str = "options kvm_amd nested=1\noptions nbd max_part=0 nbds_max=16\n";
/// The disk's size. The file is sparse, and each run writes to a copy that it throws away.
const DISK_MB: u64 = 16 * 1024;

/// What decides over the image's contents.
pub fn recipe() -> Vec<&'static str> {
    let mut parts = vec![VERSION, SUITE, BACKPORTS, FROM_BACKPORTS, MODULE_OPTIONS];
    parts.extend([EMULATOR_SUITE, EMULATOR_BACKPORTS]);
    parts.extend(EMULATOR_PACKAGES);
    parts.extend(PACKAGES);
    parts.extend(modules::EARLY);
    parts
}

/// Makes the image in the new directory `work`.
pub fn build(work: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("making the image needs root; run 'testbed image' as root once");
    }
    fs::create_dir(work).with_context(|| format!("make {}", work.display()))?;
    let root = work.join("root");
    emulator(&work.join("emulator"))?;
    packages(&root)?;
    settings(&root)?;
    kernel(&root, work)?;
    eprintln!("testbed: writing the disk");
    disk(&root, &work.join("root.ext4"))?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    // The rename that follows must not publish a file whose contents are still to be written.
    let file = fs::File::open(work.join("root.ext4")).context("open the disk")?;
    file.sync_all().context("sync the disk")
}

fn packages(root: &Path) -> Result<()> {
    let without = ["man", "locale", "doc"].map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*"));
    mmdebstrap(root, "minbase", [SUITE, BACKPORTS], FROM_BACKPORTS, PACKAGES, &without)
}

/// Unpacks the emulator with its libraries beside the disk. Nothing of it is installed or set up.
fn emulator(root: &Path) -> Result<()> {
    let suites = [EMULATOR_SUITE, EMULATOR_BACKPORTS];
    let apt = ["--aptopt=APT::Install-Recommends \"false\"".to_owned()];
    mmdebstrap(root, "extract", suites, "qemu-* seabios", EMULATOR_PACKAGES, &apt)
}

/// Fills the directory `root` with packages of a release, and with those that match `newer` of its backports.
fn mmdebstrap(
    root: &Path,
    variant: &str,
    [suite, backports]: [&str; 2],
    newer: &str,
    packages: &[&str],
    options: &[String],
) -> Result<()> {
    let archive = archive()?;
    let pin = format!(
        "printf 'Package: {newer}\\nPin: release n={backports}\\nPin-Priority: 900\\n' \
         >\"$1/etc/apt/preferences.d/backports\""
    );
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--format=directory"])
        .arg(format!("--variant={variant}"))
        .arg(format!("--setup-hook={pin}"))
        .arg(format!("--include={}", packages.join(",")))
        .args(options)
        .arg(suite)
        .arg(root)
        .arg(format!("deb {archive} {suite} main"))
        .arg(format!("deb {archive} {backports} main"));
    // The other lines are the packages' own talk.
    tool::run(command, "mmdebstrap", |line| line.starts_with("I: "))
}

/// The address of Debian's archive, as this host's apt knows it.
fn archive() -> Result<String> {
    let out = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"])
        .output()
        .context("ask apt-get for Debian's archive")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let uri = text.lines().find_map(|line| line.strip_prefix("Debian|Debian|")).map(str::to_owned);
    uri.context("apt has no Debian archive; add one to /etc/apt and run 'apt-get update'")
}

fn settings(root: &Path) -> Result<()> {
    let files = [
        ("etc/modprobe.d/testbed.conf", MODULE_OPTIONS),
        ("etc/hostname", "testbed\n"),
        ("etc/hosts", "127.0.0.1 localhost testbed\n::1 localhost\n"),
        ("etc/fstab", ""),
    ];
    for (name, text) in files {
        let path = root.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Copies the kernel and its early modules beside the disk. The kernel stays on the disk too: jobs
/// boot it in machines of their own.
fn kernel(root: &Path, work: &Path) -> Result<()> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot).with_context(|| format!("read {}", boot.display()))?;
    let version = names
        .flatten()
        .find_map(|e| Some(e.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
        .context("the packages brought no kernel")?;
    copy(&boot.join(format!("vmlinuz-{version}")), &work.join("vmlinuz"))?;
    let to = work.join("modules");
    fs::create_dir(&to).with_context(|| format!("make {}", to.display()))?;
    let mut order = String::new();
    for (i, file) in modules::early(&root.join("lib/modules").join(&version))?.iter().enumerate() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{i:02}-{}", name.trim_end_matches(".xz"));
        copy(file, &to.join(&name))?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(to.join("order"), order).with_context(|| format!("write to {}", to.display()))
}

/// Copies a file, and unpacks it if it is a compressed module.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.extension().is_none_or(|e| e != "xz") {
        fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        return Ok(());
    }
    let file = fs::File::create_new(to).with_context(|| format!("make {}", to.display()))?;
    let mut command = Command::new("xz");
    command.arg("-dc").arg(from).stdout(file);
    let status = command.status().with_context(|| format!("run xz on {}", from.display()))?;
    anyhow::ensure!(status.success(), "xz could not unpack {} ({status})", from.display());
    Ok(())
}

fn disk(root: &Path, image: &Path) -> Result<()> {
    let file = fs::File::create_new(image).with_context(|| format!("make {}", image.display()))?;
    file.set_len(DISK_MB << 20).with_context(|| format!("set the size of {}", image.display()))?;
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=16"])
        .args(["-E", "root_owner=0:0,nodiscard,lazy_itable_init=1", "-L", "testbed", "-d"])
        .arg(root)
        .arg(image);
    tool::run(command, "e2fsprogs", |_| false)
}
