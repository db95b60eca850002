//! Writing to a process: its stdin or its terminal.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::process::pty::Size;
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use super::output::set_nonblocking;

/// Where input goes.
pub enum Input {
    /// Nobody reads.
    None,
    /// The writing end of a pipe; gone once it was closed.
    Pipe(Mutex<Option<AsyncFd<OwnedFd>>>),
    /// The master of a terminal.
    Terminal { fd: AsyncFd<OwnedFd>, turn: Mutex<()> },
}

fn refused(text: &str) -> ConnectError {
    ConnectError::new(Code::FailedPrecondition, text)
}

fn open(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    set_nonblocking(&fd)?;
    // SAFETY: an OwnedFd stays the same open descriptor until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::WRITABLE) }?)
}

impl Input {
    /// Input through a pipe.
    pub fn pipe(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self::Pipe(Mutex::new(Some(open(fd)?))))
    }

    /// Input through a terminal.
    pub fn terminal(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self::Terminal { fd: open(fd)?, turn: Mutex::new(()) })
    }

    /// Writes all of it, when the process takes it. Calls take turns, so that none is torn.
    pub async fn write(&self, bytes: &[u8], pty: bool) -> Result<(), ConnectError> {
        match self {
            Self::None => Err(refused("the process was started without stdin")),
            Self::Pipe(_) if pty => Err(refused("the process has no terminal")),
            Self::Terminal { .. } if !pty => Err(refused("the process has a terminal: send its input there")),
            Self::Pipe(pipe) => match &*pipe.lock().await {
                Some(fd) => write_all(fd, bytes).await,
                None => Err(refused("stdin was closed")),
            },
            Self::Terminal { fd, turn } => {
                let _turn = turn.lock().await;
                write_all(fd, bytes).await
            }
        }
    }

    /// Ends the process's stdin.
    pub async fn close(&self) -> Result<(), ConnectError> {
        match self {
            Self::Pipe(pipe) => {
                pipe.lock().await.take();
                Ok(())
            }
            Self::None => Err(refused("the process was started without stdin")),
            Self::Terminal { .. } => Err(refused("a terminal cannot be closed: send it Ctrl-D")),
        }
    }

    /// Changes the terminal's size.
    pub fn resize(&self, size: &Size) -> Result<(), ConnectError> {
        let Self::Terminal { fd, .. } = self else { return Err(refused("the process has no terminal")) };
        let size = window(size);
        // SAFETY: TIOCSWINSZ reads a winsize, which lives through the call; the descriptor is ours.
        match unsafe { libc::ioctl(fd.get_ref().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
            0 => Ok(()),
            _ => Err(ConnectError::new(
                Code::Internal,
                format!("cannot resize: {}", io::Error::last_os_error()),
            )),
        }
    }
}

/// The kernel's form of a size; more than it can hold is as much as it can hold.
pub fn window(size: &Size) -> libc::winsize {
    let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    libc::winsize { ws_row: cells(size.rows), ws_col: cells(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), ConnectError> {
    let lost = |e: io::Error| match e.kind() {
        io::ErrorKind::BrokenPipe => refused("the process does not read its input any more"),
        _ => ConnectError::new(Code::Internal, format!("cannot write to the process: {e}")),
    };
    while !bytes.is_empty() {
        let mut ready = fd.writable().await.map_err(lost)?;
        match ready.try_io(|fd| nix::unistd::write(fd.get_ref(), bytes).map_err(io::Error::from)) {
            Ok(Ok(n)) => bytes = &bytes[n..],
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(lost(e)),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
