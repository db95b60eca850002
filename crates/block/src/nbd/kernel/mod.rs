//! Block devices of the kernel (`/dev/nbdN`), for VMMs that cannot speak NBD themselves.
//!
//! A [`DevicePool`] owns the host's NBD devices. [`DevicePool::acquire`] connects a
//! [`BlockDevice`](crate::BlockDevice) to a free one by several socket pairs, each served by the same
//! code that serves VMMs over unix sockets, and driven over generic netlink
//! (`include/uapi/linux/nbd-netlink.h`, `drivers/block/nbd.c` of the kernel).
//!
//! Promises:
//! - A device is handed out only when the kernel says that it has no connection, no size and no opener.
//! - A device that is in use by someone else, or that was not free in time after it was detached, is put
//!   in quarantine with the reason, and is not handed out by this process any more.
//! - What somebody wrote to the device is in the [`BlockDevice`](crate::BlockDevice) once `fsync` or a
//!   clean [`AttachedDevice::detach`] has returned.
//! - A connection that breaks is replaced. The kernel sends the requests that it took with it again, but
//!   only after the request timeout. A device that cannot be healed fails what is asked of it at once,
//!   and says so ([`AttachedDevice::lost`]).
//! - A killed daemon leaves its devices attached but dead: requests fail after the request timeout and
//!   the dead-connection timeout, or at once when the next [`DevicePool::open`] with the same instance
//!   name takes the devices back; the kernel keeps the name of the process with the device.

mod attached;
mod error;
mod holders;
mod message;
mod netlink;
mod owner;
mod pool;
mod servers;
mod survey;
mod sysfs;

use std::path::PathBuf;
use std::time::Duration;

pub use attached::AttachedDevice;
pub use error::{AttachError, DetachError, PoolError};
pub use pool::DevicePool;

/// What a pool is made with.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Names the installation: its later processes take back what a dead one left.
    pub instance: String,
    /// The most devices that the pool uses.
    pub limit: usize,
    /// How long detaching waits for users of a device to close it.
    pub hold_limit: Duration,
    /// How long the kernel may take to free a device whose connections were taken away.
    pub detach_limit: Duration,
}

impl PoolConfig {
    /// The defaults for an installation of this name.
    pub fn new(instance: impl Into<String>) -> Self {
        Self {
            instance: instance.into(),
            limit: 64,
            hold_limit: Duration::from_secs(10),
            detach_limit: Duration::from_secs(5),
        }
    }
}

/// How a device is attached. Times are counted in whole seconds by the kernel.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// Connections, 1 to 16: the kernel has a queue for each.
    pub connections: usize,
    /// How long requests wait for a connection when there is none, before they fail.
    pub dead_connection_timeout: Duration,
    /// How long the kernel waits for an answer before it gives the connection up and sends the request
    /// through another. Longer than the slowest read of the device's storage.
    pub request_timeout: Duration,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            dead_connection_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// A pool at one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolStatus {
    /// Devices that can be had.
    pub free: usize,
    /// Devices in use, or on their way in or out.
    pub attached: usize,
    /// Devices that are not used.
    pub quarantined: Vec<Quarantined>,
}

/// A device that the pool does not use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// Its node.
    pub node: PathBuf,
    /// One sentence.
    pub reason: String,
}

/// Says whether this host has NBD devices, and what to do if not. Blocks briefly.
///
/// # Errors
/// The reason why a pool could not be opened here.
pub fn probe() -> Result<(), PoolError> {
    survey::find().map(drop)
}
