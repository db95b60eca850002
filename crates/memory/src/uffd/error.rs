//! How a handler ends, and why a live snapshot fails.

use std::{io, time::Duration};

use nix::errno::Errno;

use super::source::SourceError;

/// Why a handler ended, when nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The VMM's process has ended.
    Exited,
    /// The VMM has closed its connection, and its process is not known.
    Disconnected,
    /// The owner has stopped it.
    Stopped,
}

/// Why a handler cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The source's memory is not the VMM's.
    #[error("the memory source has {source_size} bytes, the VMM was checked against {memory_size}")]
    Size {
        /// The size of the source in bytes.
        source_size: u64,
        /// The size that the handshake was checked against.
        memory_size: u64,
    },
    /// It was called outside of a Tokio runtime.
    #[error("a memory handler can only be started within a Tokio runtime")]
    NoRuntime,
    /// The system refused something.
    #[error("cannot {action} for the memory handler: {source}")]
    System {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Why a handler ended: the VM can run no further and must be killed.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// A page could not be read in time.
    #[error(
        "cannot read the guest memory page at offset {offset:#x}: {cause} ({attempts} attempts in {waited:.1?})"
    )]
    Source {
        /// The page's offset in the memory file.
        offset: u64,
        /// How often it was tried.
        attempts: u32,
        /// The time since the fault.
        waited: Duration,
        /// What the last attempt said.
        cause: SourceError,
    },
    /// The task that read a page broke off.
    #[error(
        "reading the guest memory page at offset {offset:#x} broke off: the source panicked or the runtime was shut down"
    )]
    BrokenOff {
        /// The page's offset in the memory file.
        offset: u64,
    },
    /// The kernel would not take a page.
    #[error("cannot put the guest memory page at offset {offset:#x} in place: {source}")]
    Fill {
        /// The page's offset in the memory file.
        offset: u64,
        /// The system's answer.
        source: Errno,
    },
    /// The events of the memory cannot be read.
    #[error("cannot {action} the events of the VMM's memory: {source}")]
    Events {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The VMM does what it should not.
    #[error("the VMM broke the memory protocol: {0}")]
    Protocol(#[from] Violation),
    /// A thread did not end when it should.
    #[error("the memory handler's threads did not end within {0:?}: the VMM's process holds them up")]
    Stuck(Duration),
}

/// What a VMM should not do with its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It forked with its userfaultfd.
    #[error("it forked")]
    Fork,
    /// It moved a mapping.
    #[error("it moved memory from {from:#x} to {to:#x}")]
    Remap {
        /// The old address.
        from: u64,
        /// The new one.
        to: u64,
    },
    /// It registered addresses that it did not tell of.
    #[error("a fault at {address:#x}, which is in no region that it told of")]
    Stray {
        /// The address.
        address: u64,
    },
    /// It made the descriptor blocking, which was set otherwise.
    #[error("it made the userfaultfd blocking")]
    Blocking,
    /// The kernel sent an event that it was not asked for.
    #[error("an event of unknown kind {0:#x}")]
    Unknown(u8),
}

/// Why a live snapshot failed. The VM runs on.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VMM's process is not known.
    #[error("a live snapshot needs to know the VMM's process: name it with Handshake::with_process")]
    NoProcess,
    /// There is one already.
    #[error("a live snapshot of this VM is under way already")]
    Busy,
    /// The kernel or the VMM's registration does not allow write-protection.
    #[error("the VMM's memory cannot be write-protected here ({0}); pause the VM for the snapshot instead")]
    Unsupported(Errno),
    /// The VMM keeps changing its mappings, so that protecting them does not get through.
    #[error("the VMM's memory could not be write-protected within {0:?} because its mappings keep changing")]
    Unsettled(Duration),
    /// The system refused something else.
    #[error("cannot {action} for a live snapshot: {source}")]
    System {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A page could not be read.
    #[error("cannot read the VM's memory at offset {offset:#x}: {source}")]
    Read {
        /// The page's offset in the memory file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The receiver of the pages failed.
    #[error("cannot save the VM's memory at offset {offset:#x}: {source}")]
    Sink {
        /// The page's offset in the memory file.
        offset: u64,
        /// What it said.
        source: io::Error,
    },
    /// The VM gave up a page (balloon) before it was saved.
    #[error(
        "the VM gave up its page at offset {offset:#x} before it was saved: let its balloon rest during a live snapshot"
    )]
    Removed {
        /// The page's offset in the memory file.
        offset: u64,
    },
    /// The handler ended.
    #[error("the VM's memory handler ended during the live snapshot")]
    Ended,
    /// The owner dropped it.
    #[error("the live snapshot was cancelled")]
    Cancelled,
}
