//! The QEMU driver: `microvm` machine, RAM in a file, disk over NBD on an inherited socket,
//! state snapshots beside the memfile (migration with `x-ignore-shared`).

pub mod args;
mod devices;
pub mod probe;
pub mod qmp;
pub mod tsc;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;

use crate::cgroup::CgroupRoot;
use crate::console::{CONSOLE_MOST, Tail};
use crate::process::{ExitWatch, Process, Spawn, socket_pair};
use crate::running::{Running, StepError};
use crate::{
    Boot, Disk, DiskDoor, DriverId, KernelFormat, Memory, MemoryDoor, MemorySaved, Needs, Result, SaveMemory,
    SnapshotFiles, Tap, TapDoor, Vm, VmConfig, Vmm, VmmError,
};
pub use args::Accel;
use args::{Fds, Machine, arguments};
use qmp::{Command, Qmp, QmpError};

/// Limit for QEMU's own steps (start, state load and save). They take milliseconds; under a
/// heavily loaded emulating host, seconds.
const STEP_LIMIT: Duration = Duration::from_secs(60);
const CONSOLE_LIMIT: usize = 64 * 1024;
/// A QEMU with its few devices has about 40 files open.
const MAX_FILES: u64 = 1024;

/// QEMU on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    accel: Accel,
    cgroups: CgroupRoot,
    /// Of the counter that guests see, where their kernels cannot be left to measure it.
    tsc_khz: Option<u64>,
}

impl Qemu {
    /// Takes the QEMU at `program` (looked up in PATH when it has no slash) and checks its version.
    ///
    /// # Errors
    /// [`VmmError::NotInstalled`], [`VmmError::TooOld`].
    pub async fn new(program: &Path, accel: Accel, cgroups: CgroupRoot) -> Result<Self> {
        let (program, version) = probe::find(program).await?;
        let tsc_khz = match accel {
            Accel::Kvm => None,
            Accel::Tcg => tokio::task::spawn_blocking(tsc::khz).await.unwrap_or_default(),
        };
        Ok(Self { program, version, accel, cgroups, tsc_khz })
    }

    async fn start(&self, config: VmConfig, boot: Option<&Boot>) -> Result<QemuVm> {
        let VmConfig { name, vcpus, memory_mb, memory, disk, tap, netns, mac, uid, limits, .. } = config;
        let cannot = |what: &str| unsupported(&name, what.to_owned());
        if config.huge_pages {
            return Err(cannot("give a guest huge pages"));
        }
        let (shared, memfile) = match memory {
            Memory::Shared(f) => (true, f),
            Memory::Private(f) => (false, f),
            other => return Err(cannot(&format!("run a guest in {}", other.name()))),
        };
        let Disk::Nbd(disk) = disk else {
            return Err(cannot("take a block device as its disk"));
        };
        let Tap::Open(tap) = tap else {
            return Err(cannot("open a tap by its name"));
        };
        let (qmp, qmp_child) = socket_pair()?;
        let console = Tail::new(CONSOLE_LIMIT);
        // Only a cold boot's console is kept: that of a sandbox is for its guest to fill.
        let serial_child = match boot {
            Some(_) => {
                let (serial, child) = socket_pair()?;
                let serial = UnixStream::from_std(serial).map_err(|e| VmmError::io("use the console", e))?;
                tokio::spawn(console.clone().keep(serial, CONSOLE_MOST));
                Some(child)
            }
            None => None,
        };
        let memfile = OwnedFd::from(memfile);
        let kvm = match self.accel {
            Accel::Kvm => Some(open_kvm()?),
            Accel::Tcg => None,
        };
        let machine = Machine { name: &name, vcpus, memory_mb, shared, mac: &mac, boot };
        let fds = Fds {
            memory: memfile.as_raw_fd(),
            disk: disk.as_raw_fd(),
            tap: tap.as_raw_fd(),
            qmp: qmp_child.as_raw_fd(),
            serial: serial_child.as_ref().map(AsRawFd::as_raw_fd),
            kvm: kvm.as_ref().map(AsRawFd::as_raw_fd),
        };
        let args = arguments(&machine, fds);
        tracing::debug!(vm = %name, ?args, "starting QEMU");
        let cgroup = self.cgroups.create(&name, limits)?;
        let mut keep = vec![memfile, disk, tap, qmp_child];
        keep.extend(serial_child);
        keep.extend(kvm);
        let spawn = Spawn {
            program: self.program.clone(),
            args,
            keep,
            netns,
            uid,
            cgroup_procs: cgroup.procs_files(),
            jail: None,
            stdout: None,
            log: None,
            max_files: MAX_FILES,
        };
        let process = Process::spawn(&name, spawn).await?;
        let stream = UnixStream::from_std(qmp).map_err(|e| VmmError::io("use the monitor socket", e))?;
        let vm = Running::new(name, process, cgroup);
        let configuration = boot.map_or_else(Vec::new, |_| devices::BOOTED.to_vec());
        let mut vm = QemuVm { vm, qmp: None, console, shared, configuration };
        let qmp = vm.vm.step("starting QEMU", STEP_LIMIT, async {
            let mut qmp = Qmp::handshake(stream).await?;
            qmp.prepare_migration().await?;
            Ok::<_, QmpError>(qmp)
        });
        vm.qmp = Some(qmp.await?);
        Ok(vm)
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn id(&self) -> DriverId {
        DriverId { driver: "qemu".into(), version: self.version.clone(), accel: self.accel.name().into() }
    }

    fn needs(&self) -> Needs {
        Needs {
            kernel: KernelFormat::BzImage,
            // No reboot=: of the ways to reset, only the kernel's own choice ends this machine
            // (`-no-reboot`) after a restart as well as after a panic, with KVM and without.
            kernel_arguments: "panic=-1 tsc=reliable no_timer_check",
            disk: DiskDoor::Nbd,
            tap: TapDoor::Open,
            memory: MemoryDoor::Memfile,
        }
    }

    async fn boot(&self, config: VmConfig, boot: &Boot) -> Result<Box<dyn Vm>> {
        let mut boot = boot.clone();
        if let Some(khz) = self.tsc_khz {
            boot.cmdline.push_str(&format!(" tsc_early_khz={khz}"));
        }
        Ok(Box::new(self.start(config, Some(&boot)).await?))
    }

    async fn prepare(&self, config: VmConfig) -> Result<Box<dyn Vm>> {
        Ok(Box::new(self.start(config, None).await?))
    }
}

fn open_kvm() -> Result<OwnedFd> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.map(OwnedFd::from).map_err(|e| VmmError::io("open /dev/kvm", e))
}

/// QEMU takes a passed file only in the very mode in which it would have opened it.
fn write_only(file: &File) -> Result<File> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().write(true).open(own).map_err(|e| VmmError::io("reopen the state file", e))
}

fn unsupported(vm: &str, what: String) -> VmmError {
    VmmError::Unsupported { vm: vm.to_owned(), driver: "QEMU", what }
}

impl From<QmpError> for StepError {
    fn from(e: QmpError) -> Self {
        match e {
            QmpError::Lost(_) => Self::Lost(e.to_string()),
            _ => Self::Refused(e.to_string()),
        }
    }
}

/// One QEMU process.
#[derive(Debug)]
struct QemuVm {
    vm: Running,
    qmp: Option<Qmp>,
    console: Tail,
    /// Its memory is in the memfile, not in a private mapping of it.
    shared: bool,
    /// What the loaded state says of the machine; the next one says the same.
    configuration: Vec<u8>,
}

impl QemuVm {
    async fn command(&mut self, action: &'static str, command: Command) -> Result<()> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.vm.step(action, STEP_LIMIT, async { qmp.execute(&command).await }).await;
        self.qmp = Some(qmp);
        result.map(drop)
    }

    async fn migrate(&mut self, action: &'static str, command: Command) -> Result<()> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.vm.step(action, STEP_LIMIT, async { qmp.migrate(&command).await }).await;
        self.qmp = Some(qmp);
        result
    }

    /// Hands an open file to QEMU (`add-fd`), which reaches it as /dev/fdset/N: it needs no right
    /// on the path to it.
    async fn pass_file(&mut self, action: &'static str, file: File) -> Result<u64> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.vm.step(action, STEP_LIMIT, async { qmp.add_fd(file.into()).await }).await;
        self.qmp = Some(qmp);
        result
    }

    /// Saves the state alone. A migration would write all memory that is not shared with a file.
    async fn save_devices(&mut self, snapfile: File) -> Result<MemorySaved> {
        const ACTION: &str = "saving the state";
        // In memory that the process accounts for, so that it has no hold on the caller's file.
        let scratch = devices::scratch().map_err(|e| VmmError::io("make a file in memory", e))?;
        let fd = self.pass_file(ACTION, write_only(&scratch)?).await?;
        self.command(ACTION, Command::XenSaveDevicesState { filename: format!("/dev/fdset/{fd}") }).await?;
        let configuration = self.configuration.clone();
        self.blocking(ACTION, move || devices::complete(&scratch, &configuration, &snapfile)).await?;
        Ok(MemorySaved::InMapping)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce() -> std::result::Result<T, devices::StateError> + Send + 'static,
    ) -> Result<T> {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result.map_err(|e| self.vm.refused(action, e.to_string())),
            Err(e) => Err(VmmError::io("finish a file operation", std::io::Error::other(e))),
        }
    }

    /// The monitor is taken for the time of an exchange; one that was cancelled half-way has
    /// lost it, since its answers would be taken for the next command's.
    fn take_qmp(&mut self, action: &'static str) -> Result<Qmp> {
        self.qmp.take().ok_or_else(|| {
            self.vm
                .refused(action, QmpError::Malformed("an earlier exchange was cancelled".into()).to_string())
        })
    }
}

#[async_trait]
impl Vm for QemuVm {
    async fn load(&mut self, snapfile: File) -> Result<()> {
        let (configuration, snapfile) = self
            .blocking("reading the state", move || devices::configuration(&snapfile).map(|c| (c, snapfile)))
            .await?;
        self.configuration = configuration;
        let fd = self.pass_file("loading the state", snapfile).await?;
        let channels = Command::MigrateIncoming { uri: format!("file:/dev/fdset/{fd}") };
        self.migrate("loading the state", channels).await
    }

    async fn resume(&mut self) -> Result<()> {
        self.command("resuming", Command::Cont {}).await
    }

    async fn pause(&mut self) -> Result<()> {
        self.command("pausing", Command::Stop {}).await
    }

    async fn snapshot(&mut self, files: SnapshotFiles) -> Result<MemorySaved> {
        let SnapshotFiles { state: snapfile, memory } = files;
        if !matches!(memory, SaveMemory::Stay) {
            return Err(unsupported(&self.vm.name, "write its memory to another file".into()));
        }
        if !self.shared {
            return self.save_devices(snapfile).await;
        }
        let copy = write_only(&snapfile)?;
        let fd = self.pass_file("saving the state", copy).await?;
        self.migrate("saving the state", Command::Migrate { uri: format!("file:/dev/fdset/{fd}") }).await?;
        snapfile.sync_all().map_err(|e| VmmError::io("sync the state file", e))?;
        Ok(MemorySaved::InMemfile)
    }

    fn pid(&self) -> u32 {
        self.vm.process.pid()
    }

    fn exit(&self) -> ExitWatch {
        self.vm.process.exit()
    }

    fn console(&self) -> String {
        self.console.text()
    }

    async fn kill(self: Box<Self>) -> Result<()> {
        self.vm.kill().await
    }
}
