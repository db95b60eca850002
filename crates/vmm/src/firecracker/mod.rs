//! The Firecracker driver: API over a unix socket, root disk on a kernel block device, a named
//! tap, memory of its own that is filled by userfaultfd or from a file on resume.
//!
//! Each process lives in a jail ([`crate::process`]): a root file system with nothing but what is
//! named in [`place`], the slot's network namespace, a user of its own, Firecracker's own
//! seccomp filters. The paths inside are the same for all VMs, so that a snapshot, which
//! remembers them, resumes in any jail.

pub mod api;
mod place;
pub mod probe;
mod program;
mod start;
mod vm;

use async_trait::async_trait;

use crate::cgroup::CgroupRoot;
use crate::{Boot, DiskDoor, DriverId, KernelFormat, MemoryDoor, Needs, Result, TapDoor, Vm, VmConfig, Vmm};
pub use api::IoEngine;
pub use probe::Verdict;
pub use program::{Program, find, versions};

/// What the kernel must be told: a reset by the keyboard controller ends Firecracker; a keyboard
/// is not looked for, nor are timers checked, which a nested VMM is too slow for.
pub(crate) const KERNEL_ARGUMENTS: &str =
    "reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd tsc=reliable no_timer_check";

/// One version of Firecracker on this host.
#[derive(Debug, Clone)]
pub struct Firecracker {
    program: Program,
    cgroups: CgroupRoot,
    io_engine: IoEngine,
}

impl Firecracker {
    /// Takes the program that [`find`] found.
    pub fn new(program: Program, cgroups: CgroupRoot) -> Self {
        Self { program, cgroups, io_engine: IoEngine::Sync }
    }

    /// How disks of cold boots are read and written from now on; a snapshot remembers it.
    #[must_use]
    pub fn with_io_engine(mut self, io_engine: IoEngine) -> Self {
        self.io_engine = io_engine;
        self
    }
}

#[async_trait]
impl Vmm for Firecracker {
    fn id(&self) -> DriverId {
        DriverId { driver: "firecracker".into(), version: self.program.version.clone(), accel: "kvm".into() }
    }

    fn needs(&self) -> Needs {
        Needs {
            kernel: KernelFormat::Elf,
            kernel_arguments: KERNEL_ARGUMENTS,
            disk: DiskDoor::Device,
            tap: TapDoor::Name,
            memory: MemoryDoor::Own,
        }
    }

    async fn boot(&self, config: VmConfig, boot: &Boot) -> Result<Box<dyn Vm>> {
        Ok(Box::new(self.start_boot(config, boot).await?))
    }

    async fn prepare(&self, config: VmConfig) -> Result<Box<dyn Vm>> {
        Ok(Box::new(self.start_prepare(config).await?))
    }
}
