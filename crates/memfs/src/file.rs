//! One served file.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
};

use crate::{Content, MemFsError, server::Server};

/// A file as the server knows it.
pub struct Node {
    content: Arc<dyn Content>,
    /// The first error of its content.
    failure: OnceLock<String>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("size", &self.size()).field("failure", &self.failure).finish()
    }
}

impl Node {
    pub fn size(&self) -> u64 {
        self.content.size()
    }

    /// Fills `buf`, or as much of it as there is of the file. Blocks.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let len = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        if len == 0 {
            return Ok(0);
        }
        self.content.read(offset, &mut buf[..len]).map_err(|e| {
            if self.failure.set(e.to_string()).is_ok() {
                tracing::error!("a memory file cannot be read: {e}");
            }
            Errno::IO
        })?;
        Ok(len)
    }
}

/// A file for as long as this value lives: afterwards it cannot be read any more, also by those who
/// have it open or mapped.
#[derive(Debug)]
pub struct ServedFile {
    /// Keeps `path` valid.
    _file: File,
    path: PathBuf,
    number: u64,
    node: Arc<Node>,
    mount: Arc<OwnedFd>,
    server: Arc<Server>,
}

impl ServedFile {
    pub(crate) fn new(
        mount: Arc<OwnedFd>,
        server: Arc<Server>,
        content: Arc<dyn Content>,
    ) -> Result<Self, MemFsError> {
        let node = Arc::new(Node { content, failure: OnceLock::new() });
        let number = server.add(node.clone());
        match open(&mount, number) {
            Ok(file) => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
                Ok(Self { _file: file, path, number, node, mount, server })
            }
            Err(e) => {
                server.remove(number);
                Err(MemFsError::Open(e))
            }
        }
    }

    /// Opens it anew, for reading only, with a position of its own. Blocks for a system call.
    pub fn open(&self) -> Result<File, MemFsError> {
        open(&self.mount, self.number).map_err(MemFsError::Open)
    }

    /// A path by which this process can open it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the first of the reads that failed did so.
    pub fn failure(&self) -> Option<&str> {
        self.node.failure.get().map(String::as_str)
    }
}

fn open(mount: &OwnedFd, number: u64) -> io::Result<File> {
    let file = openat(mount, number.to_string(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(file.into())
}

impl Drop for ServedFile {
    fn drop(&mut self) {
        self.server.remove(self.number);
    }
}
