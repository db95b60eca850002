//! What VMs are made with on this host: the VMM, and disk and network in the form that it wants.

use std::path::Path;
use std::sync::Arc;

use nidus_block::BlockDevice;
use nidus_block::nbd::kernel::{
    AttachError, AttachOptions, AttachedDevice, DetachError, DevicePool, PoolConfig, PoolError,
};
use nidus_network::{NetworkError, NetworkSlot, Pool, TapMode};
use nidus_vmm::{Disk, DiskDoor, Needs, Tap, TapDoor, Vmm, VmmError};
use tokio_util::sync::CancellationToken;

use crate::DiskServer;

/// Why a disk could not be attached or released.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No socket for it.
    #[error(transparent)]
    Socket(VmmError),
    /// No kernel block device for it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Its block device did not come free.
    #[error(transparent)]
    Detach(#[from] DetachError),
    /// The VMM wants a kernel block device and this host has no pool of them.
    #[error("the VMM wants kernel block devices, and no pool of them was opened")]
    NoPool,
    /// What the kernel keeps of it could not be written.
    #[error("Cannot flush {device}: {source}")]
    Flush {
        /// Node of the device.
        device: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// The VMM of this host and what its VMs are made with.
pub struct VmHost {
    /// The VMM.
    pub vmm: Arc<dyn Vmm>,
    /// Network slots.
    pub network: Arc<Pool>,
    /// The VMM of slot N runs as user id `uid_base + N`.
    pub uid_base: u32,
    devices: Option<DevicePool>,
}

/// How the network pool must make taps for this VMM.
pub fn tap_mode(needs: &Needs, uid_base: u32) -> TapMode {
    match needs.tap {
        TapDoor::Open => TapMode::Open,
        TapDoor::Name => TapMode::Named { uid_base },
    }
}

impl VmHost {
    /// Opens the pool of kernel block devices if the VMM wants them; those of a killed daemon of
    /// the same `instance` are taken back.
    ///
    /// # Errors
    /// When the kernel has no NBD devices.
    pub async fn open(
        vmm: Arc<dyn Vmm>,
        network: Arc<Pool>,
        uid_base: u32,
        instance: &str,
    ) -> Result<Self, PoolError> {
        let devices = match vmm.needs().disk {
            DiskDoor::Nbd => None,
            DiskDoor::Device => Some(DevicePool::open(PoolConfig::new(instance)).await?),
        };
        Ok(Self { vmm, network, uid_base, devices })
    }

    /// Takes back the kernel block devices of killed daemons of the same `instance`; their VMs cannot
    /// end before. A host that has none has nothing to take back.
    pub async fn reclaim(instance: &str) {
        match DevicePool::reclaim(PoolConfig::new(instance)).await {
            Ok(0) => {}
            Ok(devices) => tracing::warn!(devices, "took back block devices of an earlier daemon"),
            Err(e) => tracing::debug!("no block devices to take back: {e}"),
        }
    }

    /// Serves `device` in the form that the VMM wants.
    pub async fn attach(&self, device: Arc<dyn BlockDevice>) -> Result<(RootDisk, Disk), DiskError> {
        match self.vmm.needs().disk {
            DiskDoor::Nbd => {
                let (server, socket) = DiskServer::start(device).map_err(DiskError::Socket)?;
                Ok((RootDisk::Socket(server), Disk::Nbd(socket)))
            }
            DiskDoor::Device => {
                let pool = self.devices.as_ref().ok_or(DiskError::NoPool)?;
                let attached = pool.acquire(device, AttachOptions::default()).await?;
                let node = attached.path().to_owned();
                Ok((RootDisk::Device(attached), Disk::Device(node)))
            }
        }
    }

    /// The slot's tap in the form that the VMM wants.
    pub fn tap(&self, slot: &NetworkSlot) -> Result<Tap, NetworkError> {
        match self.vmm.needs().tap {
            TapDoor::Open => Ok(Tap::Open(slot.open_tap()?)),
            TapDoor::Name => Ok(Tap::Name(slot.tap_name().to_owned())),
        }
    }

    /// User id of the VMM in this slot.
    pub fn uid(&self, slot: &NetworkSlot) -> u32 {
        self.uid_base + slot.index()
    }

    /// Waits until all block devices are free, and hands out no more.
    pub async fn shutdown(&self) {
        if let Some(devices) = &self.devices {
            devices.shutdown().await;
        }
    }
}

/// A disk that a VMM has.
#[derive(Debug)]
pub enum RootDisk {
    /// Served on a socket.
    Socket(DiskServer),
    /// A kernel block device.
    Device(AttachedDevice),
}

impl RootDisk {
    /// Cancelled when the VMM can use it no more although it has it.
    pub fn lost(&self) -> CancellationToken {
        match self {
            Self::Socket(server) => server.lost(),
            Self::Device(device) => device.lost(),
        }
    }

    /// Makes the kernel write what it has cached. What a VMM wrote over a socket is with us already.
    pub async fn flush(&self) -> Result<(), DiskError> {
        let Self::Device(device) = self else { return Ok(()) };
        let node = device.path().to_owned();
        let sync = |node: &Path| std::fs::File::options().write(true).open(node)?.sync_all();
        let name = node.display().to_string();
        let done = tokio::task::spawn_blocking(move || sync(&node)).await;
        done.unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(|source| DiskError::Flush { device: name, source })
    }

    /// Takes it away from the VMM, which has ended; everything written is in the device below.
    pub async fn release(self) -> Result<(), DiskError> {
        match self {
            Self::Socket(server) => {
                server.shutdown().await;
                Ok(())
            }
            Self::Device(device) => Ok(device.detach().await?),
        }
    }
}
