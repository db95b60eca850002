//! A trait over virtual machine monitors, with drivers for QEMU and Firecracker.
//!
//! A [`Vmm`] starts VMs; a [`Vm`] is one of them. Neither knows what a template, a sandbox or a
//! storage is: they get open files, a network namespace and sizes, and give back a running,
//! paused or saved machine. The process of a VM dies with its [`Vm`], and with the daemon.
//! What the drivers want differently (disk, tap, memory, kernel image) is told by [`Vmm::needs`].

pub mod cgroup;
mod config;
mod console;
mod error;
pub mod firecracker;
pub mod guest;
mod jail;
#[cfg(test)]
mod jail_tests;
mod kernel_image;
mod mount;
pub mod process;
pub mod qemu;
mod running;
mod snapshot;

use async_trait::async_trait;

pub use cgroup::Limits;
pub use config::{Boot, Disk, DiskDoor, KernelFormat, Memory, MemoryDoor, Needs, Tap, TapDoor, VmConfig};
pub use error::{Result, VmmError};
pub use snapshot::{MemorySaved, SaveMemory, SnapshotFiles, data_ranges};

/// Page size of the guest memory that QEMU maps, in bytes.
pub const PAGE_SIZE: u64 = 4096;

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
    /// In which form it wants disk, network, memory and kernel.
    fn needs(&self) -> Needs;
    /// Cold boot. Returns once the guest's processors run.
    async fn boot(&self, config: VmConfig, boot: &Boot) -> Result<Box<dyn Vm>>;
    /// Starts a process that waits for a state to load. This is the expensive part of a resume
    /// and needs nothing but the template: pools do it ahead of need.
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
    /// Saves a paused VM and tells where its memory is then. The files' bytes come from a process
    /// that the guest may have taken over; it can change them for as long as it lives.
    async fn snapshot(&mut self, files: SnapshotFiles) -> Result<MemorySaved>;
    /// Process id of the VMM on the host.
    fn pid(&self) -> u32;
    /// A handle that tells when the process ends, usable beside the other calls.
    fn exit(&self) -> process::ExitWatch;
    /// What the guest of a cold boot wrote to its console (the last 64 KiB), for error messages.
    fn console(&self) -> String;
    /// Kills the process, waits for its end and removes its cgroup.
    async fn kill(self: Box<Self>) -> Result<()>;
}
