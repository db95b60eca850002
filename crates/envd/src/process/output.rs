//! Reading what a process writes: pipes and the master of a terminal.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Largest piece that is read and sent at once.
const CHUNK: usize = 32 << 10;

/// A descriptor that does not block.
pub struct Source(AsyncFd<OwnedFd>);

impl Source {
    /// Takes the reading end.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        // SAFETY: an OwnedFd stays the same open descriptor until it is dropped.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    /// The next piece; `None` at the end.
    pub async fn next(&self) -> Option<Bytes> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let mut ready = self.0.readable().await.ok()?;
            match ready.try_io(|fd| read(fd.get_ref(), &mut buffer)) {
                Ok(Ok(0) | Err(_)) => return None,
                Ok(Ok(n)) => {
                    buffer.truncate(n);
                    return Some(buffer.into());
                }
                Err(_would_block) => {}
            }
        }
    }

    /// What is there at this instant; `None` when nothing is.
    pub fn now(&self) -> Option<Bytes> {
        let mut buffer = vec![0; CHUNK];
        match read(self.0.get_ref(), &mut buffer) {
            Ok(0) | Err(_) => None,
            Ok(n) => {
                buffer.truncate(n);
                Some(buffer.into())
            }
        }
    }
}

/// A terminal whose other end is closed says EIO, which is its end too.
fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(nix::Error::EINTR) => {}
            r => return r.map_err(io::Error::from),
        }
    }
}

pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl(fd, FcntlArg::F_GETFL)?;
    fcntl(fd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))?;
    debug_assert!(fd.as_raw_fd() >= 0);
    Ok(())
}
