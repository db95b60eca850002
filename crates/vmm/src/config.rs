//! What VMs are made of, and which form of it each driver wants.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use tokio::sync::oneshot;

use crate::Limits;

/// Where the guest's RAM is.
#[derive(Debug)]
pub enum Memory {
    /// Writes go to the file: a cold boot whose memory becomes the template's memfile.
    Shared(File),
    /// A private, copy-on-write mapping of a file that is never written: a resumed sandbox, or one that
    /// is booted in a file of zeros.
    Private(File),
    /// The VMM's own memory: a cold boot whose memory is written to a file by its snapshots.
    Own,
    /// The VMM's own memory, filled page by page by a server in the daemon (userfaultfd). While
    /// the state is loaded, the VMM's connection is handed over; on it comes one message, the
    /// memory regions with the userfaultfd as ancillary data. The stream is non-blocking, as tokio wants
    /// it. Whoever receives it must serve at once: loading the state already touches pages.
    Served(oneshot::Sender<UnixStream>),
}

impl Memory {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Shared(_) => "a shared memory file",
            Self::Private(_) => "a private mapping of a memory file",
            Self::Own => "memory of its own",
            Self::Served(_) => "memory served by userfaultfd",
        }
    }
}

/// The root disk.
#[derive(Debug)]
pub enum Disk {
    /// One end of a socket pair; the NBD server of the disk answers at the other.
    Nbd(OwnedFd),
    /// A block device of the host, such as `/dev/nbd3`.
    Device(PathBuf),
}

/// The VM's end of the network.
#[derive(Debug)]
pub enum Tap {
    /// Opened tap of the slot (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).
    Open(OwnedFd),
    /// Name of a persistent tap in the slot's namespace that nobody has open and that belongs to the
    /// VMM's user (TUNSETOWNER).
    Name(String),
}

/// What a cold boot starts from.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Kernel image in the driver's [`KernelFormat`].
    pub kernel: PathBuf,
    /// Initial ram disk (cpio).
    pub initrd: PathBuf,
    /// Kernel command line; [`Needs::kernel_arguments`] are part of it.
    pub cmdline: String,
}

/// Everything a VM is made of. Files are handed over open wherever the VMM can take them so: it
/// then needs no right to open anything, and no path has to be reachable for its user.
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
    /// Root disk.
    pub disk: Disk,
    /// Network.
    pub tap: Tap,
    /// Network namespace that the process is put into.
    pub netns: OwnedFd,
    /// Guest's MAC address, as text.
    pub mac: String,
    /// User and group id that the process runs as; no other process shares it.
    pub uid: u32,
    /// Processor and memory limits of the process.
    pub limits: Limits,
    /// Guest RAM in pages of 2 MiB. Decided at the cold boot; a snapshot remembers it.
    pub huge_pages: bool,
    /// Keep account of written pages from now on, so that a snapshot can be a
    /// [`SaveMemory::Diff`](crate::SaveMemory) with those and no others.
    pub track_dirty: bool,
    /// On resume, move the guest's clock on by the time that has passed since the snapshot,
    /// where the VMM, the host and the snapshot can; else the guest must be told the time.
    pub advance_clock: bool,
}

/// Form of the kernel image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// As distributions ship it (`vmlinuz`).
    BzImage,
    /// Uncompressed ELF (`vmlinux`).
    Elf,
}

/// Kind of [`Disk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDoor {
    /// [`Disk::Nbd`].
    Nbd,
    /// [`Disk::Device`].
    Device,
}

/// Kind of [`Tap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapDoor {
    /// [`Tap::Open`].
    Open,
    /// [`Tap::Name`].
    Name,
}

/// Kinds of [`Memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryDoor {
    /// Boots with [`Memory::Shared`] or [`Memory::Private`], resumes with [`Memory::Private`].
    Memfile,
    /// Boots with [`Memory::Own`], resumes with [`Memory::Served`] or [`Memory::Private`].
    Own,
}

/// What a driver wants to be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Kernel image of a [`Boot`].
    pub kernel: KernelFormat,
    /// What the kernel must be told about this VMM's machine, part of [`Boot::cmdline`].
    pub kernel_arguments: &'static str,
    /// Root disk.
    pub disk: DiskDoor,
    /// Network.
    pub tap: TapDoor,
    /// Guest RAM.
    pub memory: MemoryDoor,
}
