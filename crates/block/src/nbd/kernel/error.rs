//! How kernel devices fail.

use std::io;
use std::path::PathBuf;

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The kernel has no NBD driver.
    #[error("this host's kernel has no NBD devices; load the module: modprobe nbd nbds_max=64")]
    NoModule,
    /// The process may not use it.
    #[error("NBD devices need root (CAP_SYS_ADMIN); run the daemon as root")]
    NotAllowed,
    /// The driver did not answer.
    #[error("cannot ask the kernel's NBD driver: {0}")]
    Driver(io::Error),
}

/// Why a device was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Every device is taken or unusable.
    #[error(
        "no NBD device is free ({attached} attached, {quarantined} unusable); allow more devices \
         (modprobe nbd nbds_max=N, and the pool's limit)"
    )]
    Exhausted {
        /// Devices attached or on their way in or out.
        attached: usize,
        /// Devices in quarantine.
        quarantined: usize,
    },
    /// The kernel's devices have whole blocks only.
    #[error("a device of {size} bytes cannot be attached: its size must be a multiple of {block}")]
    Unaligned {
        /// The device's size in bytes.
        size: u64,
        /// The block size in bytes.
        block: u64,
    },
    /// Too few or too many.
    #[error("{0} connections for a device: 1 to 16 are possible")]
    Connections(usize),
    /// No socket could be made.
    #[error("cannot make a connection for {}: {source}", node.display())]
    Socket {
        /// The device's node.
        node: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot attach {}: {source}", node.display())]
    Connect {
        /// The device's node.
        node: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The pool was shut down, or the runtime.
    #[error("the pool of NBD devices was shut down")]
    Shutdown,
}

/// What went wrong while a device was detached. It is out of use all the same.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// What users of the device had written may not all have reached it.
    #[error("cannot flush {} before it is detached: {source}", node.display())]
    Flush {
        /// The device's node.
        node: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The device is not known to be free and was put in quarantine.
    #[error("{} is not used any more: {reason}", node.display())]
    Quarantined {
        /// The device's node.
        node: PathBuf,
        /// One sentence.
        reason: String,
    },
    /// The runtime was shut down first; the next start reclaims the device.
    #[error("the runtime was shut down before {} was detached", node.display())]
    Shutdown {
        /// The device's node.
        node: PathBuf,
    },
}
