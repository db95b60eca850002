//! A trait over virtual machine monitors and the QEMU driver.
//!
//! A [`Vmm`] starts VMs; a [`Vm`] is one of them. Neither knows what a template, a sandbox or a
//! storage is: they get open files, a network namespace and sizes, and give back a running,
//! paused or saved machine. The process of a VM dies with its [`Vm`], and with the daemon.

pub mod cgroup;
pub mod guest;
pub mod process;
pub mod qemu;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;

pub use cgroup::Limits;

/// Page size of the guest memory that QEMU maps, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// How the guest's RAM relates to the memfile.
#[derive(Debug)]
pub enum Memory {
    /// Writes go to the file: a cold boot whose memory becomes the template's memfile.
    Shared(std::fs::File),
    /// A private, copy-on-write mapping of a file that is never written: a resumed sandbox.
    Private(std::fs::File),
}

/// What a cold boot starts from.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Kernel image (bzImage for QEMU).
    pub kernel: PathBuf,
    /// Initial ram disk (cpio).
    pub initrd: PathBuf,
    /// Kernel command line.
    pub cmdline: String,
}

/// Everything a VM is made of. Open files are handed over, so that the VMM itself needs no
/// right to open anything and no path has to be reachable for its user.
#[derive(Debug)]
pub struct VmConfig {
    /// Name for logs and for the cgroup; a sandbox or build id.
    pub name: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// Guest RAM.
    pub memory: Memory,
    /// One end of a socket pair; the NBD server of the root disk answers at the other.
    pub disk: OwnedFd,
    /// Opened tap of the slot (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).
    pub tap: OwnedFd,
    /// Network namespace that the process is put into.
    pub netns: OwnedFd,
    /// Guest's MAC address, as text.
    pub mac: String,
    /// User and group id that the process runs as; no other process shares it.
    pub uid: u32,
    /// Processor and memory limits of the process.
    pub limits: Limits,
}

/// Why a VMM did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM's program is not there.
    #[error("{program} was not found. Install it (Debian: apt-get install {package}) or set {variable}")]
    NotInstalled {
        /// What was looked for.
        program: String,
        /// Debian package that has it.
        package: &'static str,
        /// Configuration variable that names another one.
        variable: &'static str,
    },
    /// The program is there but too old.
    #[error("{program} is version {found}, but {needed} or newer is needed: {why}")]
    TooOld {
        /// What was found.
        program: String,
        /// Its version.
        found: String,
        /// Lowest version that works.
        needed: &'static str,
        /// What the older ones lack.
        why: &'static str,
    },
    /// A system call or file operation failed.
    #[error("Cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The process ended while something was wanted of it.
    #[error("{vm}: the VMM exited ({status}) while {action}: {log}")]
    Exited {
        /// Name of the VM.
        vm: String,
        /// Exit status.
        status: String,
        /// What was being done.
        action: &'static str,
        /// The last lines of its error output.
        log: String,
    },
    /// The VMM answered a command with an error.
    #[error("{vm}: {command} failed: {message}")]
    Command {
        /// Name of the VM.
        vm: String,
        /// Command that was sent.
        command: String,
        /// The VMM's text.
        message: String,
    },
    /// No answer in time.
    #[error("{vm}: no answer within {seconds} s while {action}")]
    Timeout {
        /// Name of the VM.
        vm: String,
        /// What was being done.
        action: &'static str,
        /// The limit in seconds.
        seconds: u64,
    },
}

impl VmmError {
    /// An [`VmmError::Io`] with what was being done.
    pub fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}

/// Result of this crate.
pub type Result<T, E = VmmError> = std::result::Result<T, E>;

/// Name and version of a driver as recorded in a template: a state snapshot is only loaded by
/// the same VMM in the same version.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DriverId {
    /// `qemu` or `firecracker`.
    pub driver: String,
    /// Version of the program, such as `10.0.2`.
    pub version: String,
    /// Accelerator and what else decides whether a snapshot can be loaded: `tcg` or `kvm`.
    pub accel: String,
}

impl std::fmt::Display for DriverId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ({})", self.driver, self.version, self.accel)
    }
}

/// A virtual machine monitor that can start VMs on this host.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// What a snapshot made here can be loaded by.
    fn id(&self) -> DriverId;
    /// Cold boot. Returns once the guest's processors run.
    async fn boot(&self, config: VmConfig, boot: &Boot) -> Result<Box<dyn Vm>>;
    /// Starts a process that waits for a state to load, its devices already made. This is the
    /// expensive part of a resume and needs nothing but the template: pools do it ahead of need.
    async fn prepare(&self, config: VmConfig) -> Result<Box<dyn Vm>>;
}

/// One VM. Dropping it kills its process and removes its cgroup.
#[async_trait]
pub trait Vm: Send + Sync {
    /// Loads a state snapshot into a prepared VM; the guest stays stopped.
    async fn load(&mut self, snapfile: std::fs::File) -> Result<()>;
    /// Lets the guest's processors run.
    async fn resume(&mut self) -> Result<()>;
    /// Stops the guest's processors.
    async fn pause(&mut self) -> Result<()>;
    /// Saves the device state of a paused VM into `snapfile`; memory stays in the memfile.
    async fn snapshot(&mut self, snapfile: std::fs::File) -> Result<()>;
    /// Process id of the VMM on the host.
    fn pid(&self) -> u32;
    /// A handle that tells when the process ends, usable beside the other calls.
    fn exit(&self) -> process::ExitWatch;
    /// What the guest wrote to its console (the last 64 KiB), for error messages.
    fn console(&self) -> String;
    /// Kills the process, waits for its end and removes its cgroup.
    async fn kill(self: Box<Self>) -> Result<()>;
}
