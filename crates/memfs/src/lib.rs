//! Read-only files whose bytes this process makes, for programs that map files by themselves.
//!
//! QEMU maps its guest's memory from a file. For its bytes to be checked, put together from several
//! builds, or fetched from elsewhere, the file is one of a FUSE file system whose server is this
//! process. The mount has no name in any directory: files are reached through its descriptor, and it
//! is gone with the last descriptor, also when the process is killed. The kernel's page cache of a
//! file is shared by all who have it open or mapped.
//!
//! The server's threads are its own, so a runtime whose threads all wait for pages of such a file does
//! not stop it. In return a [`Content`] must never touch memory that is mapped from here.
#![forbid(unsafe_code)]

mod file;
mod mount;
mod server;
mod wire;

use std::{error::Error, io, os::fd::OwnedFd, sync::Arc};

pub use file::ServedFile;

use server::Server;

/// What a file consists of. It never changes.
pub trait Content: Send + Sync + 'static {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; the range is within the size. Blocks as long as it must. An error is
    /// an I/O error to whoever reads the file, and a SIGBUS to whoever has it mapped.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Why files cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MemFsError {
    /// The kernel refused.
    #[error("cannot {action} the file system of memory files: {source}")]
    Mount {
        /// What was being done, as an infinitive.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file of it cannot be opened.
    #[error("cannot open a memory file: {0}")]
    Open(io::Error),
}

impl MemFsError {
    fn mount(action: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |e| Self::Mount { action, source: e.into() }
    }
}

/// The file system. It is unmounted when it and all its files are dropped and closed; its threads end
/// then.
#[derive(Debug)]
pub struct MemFs {
    mount: Arc<OwnedFd>,
    server: Arc<Server>,
}

impl MemFs {
    /// Mounts an empty file system and starts its server with as many threads. Needs the right to
    /// mount. Blocks for a few system calls.
    pub fn start(threads: usize) -> Result<Self, MemFsError> {
        let (device, mount) = mount::mount()?;
        let server = Server::start(device, threads)?;
        Ok(Self { mount: Arc::new(mount), server })
    }

    /// Adds a file. Blocks until the server has answered for it.
    pub fn serve(&self, content: Arc<dyn Content>) -> Result<ServedFile, MemFsError> {
        ServedFile::new(self.mount.clone(), self.server.clone(), content)
    }
}
