//! The QEMU driver: `microvm` machine, RAM in a file, disk over NBD on an inherited socket,
//! state snapshots beside the memfile (migration with `x-ignore-shared`).

pub mod args;
pub mod probe;
pub mod qmp;
mod tsc;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::cgroup::{Cgroup, CgroupRoot};
use crate::process::{ExitWatch, Process, Spawn, socket_pair};
use crate::{Boot, DriverId, Memory, Result, Vm, VmConfig, Vmm, VmmError};
pub use args::Accel;
use args::{Fds, Machine, arguments};
use qmp::{Command, Qmp, QmpError};

/// Limit for QEMU's own steps (start, state load and save). They take milliseconds; under a
/// heavily loaded emulating host, seconds.
const STEP_LIMIT: Duration = Duration::from_secs(60);
const CONSOLE_LIMIT: usize = 64 * 1024;

/// QEMU on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    accel: Accel,
    kvm_group: Option<u32>,
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
        let kvm_group = match accel {
            Accel::Kvm => probe::device_group(Path::new("/dev/kvm")),
            Accel::Tcg => None,
        };
        let tsc_khz = match accel {
            Accel::Kvm => None,
            Accel::Tcg => tokio::task::spawn_blocking(tsc::khz).await.unwrap_or_default(),
        };
        Ok(Self { program, version, accel, kvm_group, cgroups, tsc_khz })
    }

    async fn start(&self, config: VmConfig, boot: Option<&Boot>) -> Result<QemuVm> {
        let VmConfig { name, vcpus, memory_mb, memory, disk, tap, netns, mac, uid, limits } = config;
        let (shared, memfile) = match memory {
            Memory::Shared(f) => (true, f),
            Memory::Private(f) => (false, f),
        };
        let (qmp, qmp_child) = socket_pair()?;
        let console = Arc::new(Mutex::new(Vec::new()));
        // Only a cold boot's console is kept: that of a sandbox is for its guest to fill.
        let serial_child = match boot {
            Some(_) => {
                let (serial, child) = socket_pair()?;
                let serial = UnixStream::from_std(serial).map_err(|e| VmmError::io("use the console", e))?;
                tokio::spawn(keep_console(serial, console.clone()));
                Some(child)
            }
            None => None,
        };
        let memfile = OwnedFd::from(memfile);
        let machine = Machine { name: &name, accel: self.accel, vcpus, memory_mb, shared, mac: &mac, boot };
        let fds = Fds {
            memory: memfile.as_raw_fd(),
            disk: disk.as_raw_fd(),
            tap: tap.as_raw_fd(),
            qmp: qmp_child.as_raw_fd(),
            serial: serial_child.as_ref().map(AsRawFd::as_raw_fd),
        };
        let args = arguments(&machine, fds);
        tracing::debug!(vm = %name, ?args, "starting QEMU");
        let cgroup = self.cgroups.create(&name, limits)?;
        let mut keep = vec![memfile, disk, tap, qmp_child];
        keep.extend(serial_child);
        let spawn = Spawn {
            program: self.program.clone(),
            args,
            keep,
            netns,
            uid,
            groups: self.kvm_group.into_iter().collect(),
            cgroup_procs: cgroup.procs_files(),
        };
        let process = Process::spawn(&name, spawn).await?;
        let stream = UnixStream::from_std(qmp).map_err(|e| VmmError::io("use the monitor socket", e))?;
        let mut vm = QemuVm { name, process, qmp: None, console, _cgroup: cgroup };
        let qmp = vm.step("starting QEMU", async {
            let mut qmp = Qmp::handshake(stream).await?;
            qmp.prepare_migration().await?;
            Ok(qmp)
        });
        vm.qmp = Some(qmp.await?);
        Ok(vm)
    }
}

async fn keep_console(mut serial: UnixStream, console: Arc<Mutex<Vec<u8>>>) {
    let mut buf = [0u8; 4096];
    while let Ok(n) = serial.read(&mut buf).await {
        if n == 0 {
            return;
        }
        if let Ok(mut text) = console.lock() {
            text.extend_from_slice(&buf[..n]);
            let over = text.len().saturating_sub(CONSOLE_LIMIT);
            text.drain(..over);
        }
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn id(&self) -> DriverId {
        DriverId { driver: "qemu".into(), version: self.version.clone(), accel: self.accel.name().into() }
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

/// One QEMU process.
#[derive(Debug)]
struct QemuVm {
    name: String,
    process: Process,
    qmp: Option<Qmp>,
    console: Arc<Mutex<Vec<u8>>>,
    // Last: dropped, and so removed, after the process was killed.
    _cgroup: Cgroup,
}

impl QemuVm {
    /// Runs one exchange with QEMU, bounded in time and ended by the process's death.
    async fn step<T>(
        &self,
        action: &'static str,
        work: impl Future<Output = Result<T, QmpError>>,
    ) -> Result<T> {
        match tokio::time::timeout(STEP_LIMIT, work).await {
            Ok(Ok(v)) => Ok(v),
            Ok(Err(QmpError::Lost(e))) => {
                // The monitor closes just before the exit is known.
                let mut exit = self.process.exit();
                match tokio::time::timeout(Duration::from_secs(2), exit.wait()).await {
                    Ok(status) => Err(self.exited(status, action)),
                    Err(_) => Err(self.refused(action, QmpError::Lost(e))),
                }
            }
            Ok(Err(e)) => Err(self.refused(action, e)),
            Err(_) => {
                let seconds = STEP_LIMIT.as_secs();
                Err(VmmError::Timeout { vm: self.name.clone(), action, seconds })
            }
        }
    }

    fn exited(&self, status: String, action: &'static str) -> VmmError {
        VmmError::Exited { vm: self.name.clone(), status, action, log: self.process.log() }
    }

    fn refused(&self, action: &str, e: QmpError) -> VmmError {
        VmmError::Command { vm: self.name.clone(), command: action.into(), message: e.to_string() }
    }

    async fn command(&mut self, action: &'static str, command: Command) -> Result<()> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.step(action, async { qmp.execute(&command).await }).await;
        self.qmp = Some(qmp);
        result.map(drop)
    }

    async fn migrate(&mut self, action: &'static str, command: Command) -> Result<()> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.step(action, async { qmp.migrate(&command).await }).await;
        self.qmp = Some(qmp);
        result
    }

    /// Hands an open file to QEMU (`add-fd`), which reaches it as /dev/fdset/N: it needs no right
    /// on the path to it.
    async fn pass_file(&mut self, action: &'static str, file: File) -> Result<u64> {
        let mut qmp = self.take_qmp(action)?;
        let result = self.step(action, async { qmp.add_fd(file.into()).await }).await;
        self.qmp = Some(qmp);
        result
    }

    /// The monitor is taken for the time of an exchange; one that was cancelled half-way has
    /// lost it, since its answers would be taken for the next command's.
    fn take_qmp(&mut self, action: &'static str) -> Result<Qmp> {
        self.qmp.take().ok_or_else(|| {
            self.refused(action, QmpError::Malformed("an earlier exchange was cancelled".into()))
        })
    }
}

#[async_trait]
impl Vm for QemuVm {
    async fn load(&mut self, snapfile: File) -> Result<()> {
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

    async fn snapshot(&mut self, snapfile: File) -> Result<()> {
        // QEMU takes a passed file only in the very mode in which it would have opened it.
        let own = format!("/proc/self/fd/{}", snapfile.as_raw_fd());
        let copy =
            File::options().write(true).open(own).map_err(|e| VmmError::io("reopen the state file", e))?;
        let fd = self.pass_file("saving the state", copy).await?;
        self.migrate("saving the state", Command::Migrate { uri: format!("file:/dev/fdset/{fd}") }).await?;
        snapfile.sync_all().map_err(|e| VmmError::io("sync the state file", e))
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn exit(&self) -> ExitWatch {
        self.process.exit()
    }

    fn console(&self) -> String {
        self.console.lock().map(|c| String::from_utf8_lossy(&c).into_owned()).unwrap_or_default()
    }

    async fn kill(self: Box<Self>) -> Result<()> {
        let Self { process, _cgroup: cgroup, .. } = *self;
        process.kill().await;
        // rmdir of a cgroup can wait for the kernel.
        tokio::task::spawn_blocking(move || drop(cgroup))
            .await
            .map_err(|e| VmmError::io("remove the cgroup", std::io::Error::other(e)))
    }
}
