//! The QEMU driver with a real QEMU (emulated, so everywhere) and a real kernel. This program is also
//! the guest's first process, the same as in the Firecracker driver's tests.

// A test program, though not one of libtest's.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "firecracker/guest.rs"]
mod guest;
#[path = "firecracker/host.rs"]
#[allow(dead_code)] // Loop devices are for Firecracker.
mod host;
#[path = "firecracker/net.rs"]
#[allow(dead_code)]
mod net;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use net::Namespace;
use nidus_block::nbd::{Export, serve};
use nidus_block::{FileDevice, Overlay};
use nidus_vmm::cgroup::CgroupRoot;
use nidus_vmm::guest::Kernel;
use nidus_vmm::process::socket_pair;
use nidus_vmm::qemu::{Accel, Qemu, probe};
use nidus_vmm::{Boot, Disk, Limits, Memory, MemorySaved, SaveMemory, SnapshotFiles, Tap, VmConfig, Vmm};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

const MEMORY_MB: u32 = 128;

/// The overlay of a disk as a socket on which NBD is spoken. Must be called on the runtime.
fn disk(overlay: Arc<Overlay>) -> Result<Disk, Failed> {
    let (ours, theirs) = socket_pair()?;
    let stream = UnixStream::from_std(ours)?;
    // It ends with the VMM.
    tokio::spawn(async move {
        let _ = serve(stream, &Export::new("root", overlay), &CancellationToken::new()).await;
    });
    Ok(Disk::Nbd(theirs))
}

fn config(name: &str, memory: Memory, disk: Disk, network: &Namespace, tap: File) -> VmConfig {
    VmConfig {
        name: name.into(),
        vcpus: 1,
        memory_mb: MEMORY_MB,
        memory,
        disk,
        tap: Tap::Open(tap.into()),
        netns: network.open(),
        mac: "02:FC:00:00:00:05".into(),
        uid: host::new_uid(),
        limits: Limits { memory_bytes: 512 << 20, cpu_millis: 2000 },
        huge_pages: false,
        track_dirty: false,
        advance_clock: false,
    }
}

fn new_file(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

async fn ask(network: &Arc<Namespace>, question: &'static str) -> Result<String, Failed> {
    let network = network.clone();
    Ok(tokio::task::spawn_blocking(move || network.ask(question)).await??)
}

/// Cold boot with shared memory, state saved beside it; then twice at once from there, privately.
async fn boots_saves_and_resumes(dir: PathBuf, kernel: Kernel) -> Result<(), Failed> {
    let cgroups = CgroupRoot::new(&format!("nidus-test-qemu-{}", std::process::id()))?;
    let vmm = Qemu::new(Path::new("qemu-system-x86_64"), Accel::Tcg, cgroups.clone()).await?;
    let initrd = dir.join("initrd");
    kernel.write_initramfs(Path::new("/proc/self/exe"), &initrd)?;
    let image = dir.join("image");
    new_file(&image)?.set_len(4 << 20)?;
    let base = Arc::new(FileDevice::open(&image).await?);

    let (network, tap) = Namespace::with_tap(0)?;
    let network = Arc::new(network);
    let (memory_path, state_path) = (dir.join("memfile"), dir.join("snapfile"));
    let memory = new_file(&memory_path)?;
    memory.set_len(u64::from(MEMORY_MB) << 20)?;
    let overlay = Arc::new(Overlay::create(base, dir.join("overlay")).await?);
    let config0 = config("cold", Memory::Shared(memory), disk(overlay.clone())?, &network, tap);
    std::os::unix::fs::chown(&memory_path, Some(config0.uid), Some(config0.uid))?;
    let cmdline = format!("console=ttyS0 quiet {}", vmm.needs().kernel_arguments);
    let boot = Boot { kernel: kernel.image_for(vmm.needs().kernel)?, initrd, cmdline };
    let mut vm = vmm.boot(config0, &boot).await?;
    let first = ask(&network, "sum")
        .await
        .map_err(|e| format!("{}; console: {}", e.message().unwrap_or_default(), vm.console()))?;
    assert!(vm.console().contains("nidus: guest is up"), "{}", vm.console());
    vm.pause().await?;
    let files = SnapshotFiles { state: new_file(&state_path)?, memory: SaveMemory::Stay };
    assert_eq!(vm.snapshot(files).await?, MemorySaved::InMemfile);
    vm.kill().await?;
    drop(network);
    let mut permissions = std::fs::metadata(&memory_path)?.permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&memory_path, permissions)?;

    let mut clones = Vec::new();
    for name in ["a", "b"] {
        let (network, tap) = Namespace::with_tap(0)?;
        let network = Arc::new(network);
        let memory = Memory::Private(File::open(&memory_path)?);
        // They only read their disk.
        let config = config(name, memory, disk(overlay.clone())?, &network, tap);
        let mut vm = vmm.prepare(config).await?;
        vm.load(File::open(&state_path)?).await?;
        vm.resume().await?;
        clones.push((vm, network));
    }
    ask(&clones[0].1, "fill 50").await?;
    assert_eq!(ask(&clones[1].1, "sum").await?, first);
    assert_ne!(ask(&clones[0].1, "sum").await?, first);
    assert_eq!(ask(&clones[0].1, "disk").await?.as_bytes(), guest::DISK_TEXT);
    // A guest that resets itself ends its VMM.
    let (vm, network) = clones.remove(0);
    tokio::task::spawn_blocking(move || network.tell("crash")).await??;
    assert!(vm.exit().wait().await.contains("exit status: 0"));
    vm.kill().await?;
    for (vm, _) in clones {
        vm.kill().await?;
    }
    cgroups.remove();
    Ok(())
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    let test = || {
        let runtime = tokio::runtime::Runtime::new()?;
        if let Err(e) = runtime.block_on(probe::find(Path::new("qemu-system-x86_64"))) {
            return Ok(Completion::ignored_with(e));
        }
        let dir = tempfile::tempdir()?;
        // The VMM's user opens what is in it by path.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let kernel = match host::kernel(dir.path()) {
            Ok(kernel) => kernel,
            Err(reason) => return Ok(Completion::ignored_with(reason)),
        };
        runtime.block_on(boots_saves_and_resumes(dir.path().to_owned(), kernel))?;
        Ok(Completion::Completed)
    };
    let trials = vec![Trial::ignorable_test("a_guest_boots_is_saved_and_resumes_twice", test)];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
