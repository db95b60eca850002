//! Cold boot of a new root disk, and the snapshot of the guest once it is ready.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nidus_block::{FileDevice, Frozen, Overlay, ReadDevice};
use nidus_envd_protocol::{Client, EnvdClient, StartCommand};
use nidus_network::NetworkSlot;
use nidus_vmm::{Boot, Limits, Memory, MemoryDoor, SaveMemory, SnapshotFiles, Vm, VmConfig};
use rustix::fs::FallocateFlags;
use tokio_util::sync::CancellationToken;

use crate::build::{Level, Log, envd_addr};
use crate::{BuildError, VmHost};

/// What to boot and where to save it.
pub struct ColdBoot {
    /// Name of the VM.
    pub name: String,
    /// Kernel.
    pub boot: Boot,
    /// Virtual processors.
    pub vcpus: u32,
    /// MiB.
    pub memory_mb: u32,
    /// Whether in pages of 2 MiB.
    pub huge_pages: bool,
    /// Root disk; the guest's writes are in it afterwards.
    pub rootfs: PathBuf,
    /// Made here; holds the guest's memory afterwards.
    pub memfile: PathBuf,
    /// Made here; holds the device state afterwards.
    pub snapfile: PathBuf,
    /// Scratch file for the guest's writes.
    pub overlay: PathBuf,
    /// Longest time until envd answers.
    pub limit: Duration,
    /// Whether what a sandbox needs may be missing, and is to be installed by the system's own means.
    pub provision: bool,
}

/// Commands run in the guest before the snapshot, so that what a first command needs is in the
/// page cache that all sandboxes share: shells, Python and its start-up modules.
const WARM_UP: &[&str] = &[
    "python3 -c 'import json, os, sys, subprocess, socket, http.server, uuid, random, asyncio'",
    "ls -la / /home/user; cat /etc/os-release; id; git --version; curl --version; sudo -n true",
    "echo ready",
];

/// Boots, waits, warms up, saves. Every part that was acquired is released in reverse order.
pub async fn cold_boot(
    host: &VmHost,
    cold: &ColdBoot,
    log: &Log,
    cancel: &CancellationToken,
) -> Result<(), BuildError> {
    let slot = host.network.acquire().await?;
    let result = with_slot(host, &slot, cold, log, cancel).await;
    host.network.release(slot).await;
    result
}

async fn with_slot(
    host: &VmHost,
    slot: &NetworkSlot,
    cold: &ColdBoot,
    log: &Log,
    cancel: &CancellationToken,
) -> Result<(), BuildError> {
    let base: Arc<dyn ReadDevice> = Arc::new(FileDevice::open(&cold.rootfs).await?);
    let overlay = Arc::new(Overlay::create(base, &cold.overlay).await?);
    let (root, disk) = host.attach(overlay.clone()).await?;
    let result: Result<(), BuildError> = async {
        let memfile = new_file(&cold.memfile)?;
        let uid = host.uid(slot);
        let (memory, save_memory) = match host.vmm.needs().memory {
            MemoryDoor::Memfile => {
                memfile
                    .set_len(u64::from(cold.memory_mb) << 20)
                    .map_err(|e| BuildError::io("size", &cold.memfile, e))?;
                // The VMM opens the memory by the file that it inherits, as its own user.
                std::os::unix::fs::chown(&cold.memfile, Some(uid), Some(uid))
                    .map_err(|e| BuildError::io("change the owner of", &cold.memfile, e))?;
                (Memory::Shared(memfile), SaveMemory::Stay)
            }
            MemoryDoor::Own => (Memory::Own, SaveMemory::Full(memfile)),
        };
        let config = VmConfig {
            name: cold.name.clone(),
            vcpus: cold.vcpus,
            memory_mb: cold.memory_mb,
            memory,
            disk,
            tap: host.tap(slot)?,
            netns: slot.netns()?,
            mac: nidus_network::GUEST_MAC.to_owned(),
            uid,
            limits: limits(cold.vcpus, cold.memory_mb),
            huge_pages: cold.huge_pages,
            track_dirty: false,
            advance_clock: false,
        };
        log.info(format!("cold boot with {}", host.vmm.id()));
        let mut vm = host.vmm.boot(config, &cold.boot).await?;
        let saved = save(vm.as_mut(), slot, cold, save_memory, log, cancel).await;
        let killed = vm.kill().await;
        saved?;
        killed?;
        Ok(())
    }
    .await;
    let released = root.release().await;
    result?;
    released?;
    let (changes, target) = (overlay.freeze().await?, cold.rootfs.clone());
    let copied = crate::build::blocking(move || merge(&changes, &target)).await;
    let memfile = cold.memfile.clone();
    crate::build::blocking(move || {
        punch_zeroes(&memfile).map_err(|e| BuildError::io("take the zeros out of", &memfile, e))
    })
    .await?;
    fs::set_permissions(&cold.memfile, std::os::unix::fs::PermissionsExt::from_mode(0o444))
        .and_then(|()| std::os::unix::fs::chown(&cold.memfile, Some(0), Some(0)))
        .map_err(|e| BuildError::io("change the owner of", &cold.memfile, e))?;
    copied
}

/// Limits of a VM's process: the guest's memory and what the VMM itself needs (emulation keeps
/// translated code and tables; shared/feasibility.md counted 40 MiB for a small guest).
pub fn limits(vcpus: u32, memory_mb: u32) -> Limits {
    Limits {
        memory_bytes: (u64::from(memory_mb) + 320) << 20,
        // The guest's processors, and a share for the VMM's own threads.
        cpu_millis: vcpus * 1000 + 500,
    }
}

async fn save(
    vm: &mut dyn Vm,
    slot: &NetworkSlot,
    cold: &ColdBoot,
    memory: SaveMemory,
    log: &Log,
    cancel: &CancellationToken,
) -> Result<(), BuildError> {
    let envd = EnvdClient::new(envd_addr(slot.host_ip()), None);
    let mut exit = vm.exit();
    let started = std::time::Instant::now();
    let reason = tokio::select! {
        () = cancel.cancelled() => return Err(BuildError::Cancelled),
        status = exit.wait() => Some(format!("the VM ended ({status})")),
        r = envd.wait_ready(cold.limit) => r.err().map(|e| e.to_string()),
    };
    if let Some(reason) = reason {
        return Err(BuildError::NotReady { reason, console: tail(&vm.console()) });
    }
    log.info(format!("envd answers after {:.1} s", started.elapsed().as_secs_f64()));
    let client = Client::direct(envd_addr(slot.host_ip()));
    if cold.provision {
        let provisioned = provision(&client, log, cancel).await;
        provisioned.map_err(|reason| match reason {
            Failed::Cancelled => BuildError::Cancelled,
            Failed::Reason(reason) => BuildError::BadRequest(reason),
        })?;
    }
    let warmed = warm_up(&client, cold.provision, log, cancel).await;
    warmed.map_err(|reason| match reason {
        Failed::Cancelled => BuildError::Cancelled,
        Failed::Reason(reason) => BuildError::NotReady { reason, console: tail(&vm.console()) },
    })?;
    log.info("saving memory and device state");
    vm.pause().await?;
    let state = new_file(&cold.snapfile)?;
    vm.snapshot(SnapshotFiles { state, memory }).await?;
    let size = fs::metadata(&cold.snapfile).map_err(|e| BuildError::io("look at", &cold.snapfile, e))?.len();
    log.info(format!("device state: {} KiB", size / 1024));
    Ok(())
}

/// Why something in the guest was not done.
enum Failed {
    Cancelled,
    Reason(String),
}

/// Longest time of one command before the snapshot; installing programs takes longer.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
const PROVISION_LIMIT: Duration = Duration::from_secs(900);

async fn run(
    client: &Client,
    command: StartCommand,
    limit: Duration,
    cancel: &CancellationToken,
) -> Result<nidus_envd_protocol::Output, Failed> {
    let run = client.run(command.timeout(limit));
    tokio::select! {
        () = cancel.cancelled() => Err(Failed::Cancelled),
        r = run => r.map_err(|e| Failed::Reason(e.to_string())),
    }
}

/// What sandboxes need and what the images that people use may lack: commands are run by bash, `ss` and `pgrep`
/// are what the SDKs' ready commands call, tar unpacks what is copied.
async fn provision(client: &Client, log: &Log, cancel: &CancellationToken) -> Result<(), Failed> {
    let script = include_str!("provision.sh");
    let command = StartCommand::new("/bin/sh").args(["-c", script]).user("root").cwd("/");
    let out = run(client, command, PROVISION_LIMIT, cancel).await;
    let out = out.map_err(|e| match e {
        Failed::Reason(e) => Failed::Reason(format!("the image has no shell (/bin/sh) that works: {e}")),
        e => e,
    })?;
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        log.info(line);
    }
    if out.exit_code != 0 {
        let text = String::from_utf8_lossy(&out.stderr);
        let last =
            text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no reason is known").to_owned();
        return Err(Failed::Reason(last));
    }
    Ok(())
}

/// In an image of somebody else's, what it does not have is left out.
async fn warm_up(
    client: &Client,
    lenient: bool,
    log: &Log,
    cancel: &CancellationToken,
) -> Result<(), Failed> {
    let commands = WARM_UP.iter().map(|c| ("user", *c, lenient)).chain([("root", "sync", false)]);
    for (user, command, lenient) in commands {
        let reason = match run(client, StartCommand::shell(command).user(user), COMMAND_LIMIT, cancel).await {
            Ok(out) if out.exit_code == 0 => continue,
            Ok(out) => {
                format!("'{command}' exited {}: {}", out.exit_code, String::from_utf8_lossy(&out.stderr))
            }
            Err(Failed::Cancelled) => return Err(Failed::Cancelled),
            Err(Failed::Reason(e)) => format!("'{command}': {e}"),
        };
        if !lenient {
            log.at(Level::Warn, &reason);
            return Err(Failed::Reason(reason));
        }
        log.at(Level::Debug, reason);
    }
    Ok(())
}

/// Writes the guest's changes back into the image, which nobody uses yet.
fn merge(changes: &Frozen, rootfs: &Path) -> Result<(), BuildError> {
    use std::os::unix::fs::FileExt;
    let wrap = |e| BuildError::io("merge the guest's writes into", rootfs, e);
    let to = File::options().write(true).open(rootfs).map_err(wrap)?;
    let mut piece = vec![0u8; 1 << 20];
    for range in changes.ranges() {
        let mut at = range.start;
        while at < range.end {
            let part = (range.end - at).min(piece.len() as u64) as usize;
            changes.read_blocking(at, &mut piece[..part])?;
            to.write_all_at(&piece[..part], at).map_err(wrap)?;
            at += part as u64;
        }
    }
    to.sync_all().map_err(wrap)
}

/// Makes holes of pages that are all zero: they take no room on the disk nor in the page cache, and
/// are known to be zero without being read.
fn punch_zeroes(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    const CHUNK: usize = 1 << 20;
    const PAGE: usize = nidus_vmm::PAGE_SIZE as usize;
    let file = File::options().read(true).write(true).open(path)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let mut buffer = vec![0u8; CHUNK];
    for range in nidus_vmm::data_ranges(&file)? {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(CHUNK).min(CHUNK);
            file.read_exact_at(&mut buffer[..len], at)?;
            let mut zeros: Option<(u64, u64)> = None;
            for (i, page) in buffer[..len].chunks(PAGE).enumerate() {
                let start = at + (i * PAGE) as u64;
                if page.iter().all(|b| *b == 0) {
                    let begin = zeros.map_or(start, |(begin, _)| begin);
                    zeros = Some((begin, start + page.len() as u64));
                } else if let Some((begin, end)) = zeros.take() {
                    rustix::fs::fallocate(&file, flags, begin, end - begin)?;
                }
            }
            if let Some((begin, end)) = zeros {
                rustix::fs::fallocate(&file, flags, begin, end - begin)?;
            }
            at += len as u64;
        }
    }
    file.sync_all()
}

fn new_file(path: &Path) -> Result<File, BuildError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| BuildError::io("make", path, e))
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn zero_pages_become_holes_and_nothing_else_changes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut content = vec![0u8; 3 << 20];
        content[5000] = 1;
        content[(1 << 20) - 1] = 2;
        content[(2 << 20) + 8192] = 3;
        file.as_file().write_all_at(&content, 0).unwrap();
        file.as_file().sync_all().unwrap();
        punch_zeroes(file.path()).unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), content);
        let used = fs::metadata(file.path()).unwrap().blocks() * 512;
        assert!(used <= 64 << 10, "{used} bytes are in use for three pages");
    }
}
