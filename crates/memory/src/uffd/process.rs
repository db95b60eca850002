//! The process whose memory is served.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use nix::libc;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process, known by a descriptor that stays right when its number is used again.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process with this number. Right only if it cannot have ended and been waited for
    /// meanwhile, as for a child of one's own.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self { pid, pidfd: pidfd_open(number, PidfdFlags::empty())? })
    }

    /// The process that connected the socket; `None` if this process did itself, or if it has
    /// ended.
    pub fn peer_of(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let pid = rustix::net::sockopt::socket_peercred(socket)?.pid.as_raw_nonzero().get() as u32;
        if pid == std::process::id() {
            return Ok(None);
        }
        match peer_pidfd(socket) {
            Ok(pidfd) => Ok(Some(Self { pid, pidfd })),
            // Before Linux 6.5 only the number can be had.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => match Self::of_pid(pid) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
                result => result.map(Some),
            },
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
    }

    /// Its memory, for reading; needs the right to trace it. What is opened belongs to the
    /// process's memory as it is now: after its end, nothing can be read.
    pub(super) fn memory(&self) -> io::Result<ProcessMemory> {
        let file = File::open(format!("/proc/{}/mem", self.pid))?;
        // If the process has not ended by now, the number named it when the file was opened.
        if self.has_ended()? {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(ProcessMemory(file))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// The open memory of a process.
#[derive(Debug)]
pub(super) struct ProcessMemory(File);

impl ProcessMemory {
    /// Fills the buffer from this address on.
    pub(super) fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, address)
    }
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of_val(&fd) as libc::socklen_t;
    // SAFETY: `fd` and `len` outlive the call and `len` is the size of `fd`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen_and_its_memory_is_gone() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let process = Process::of_pid(child.id()).unwrap();
        assert!(!process.has_ended().unwrap());
        let memory = process.memory().unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
        let start = u64::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap();
        let mut head = [0; 4];
        memory.read(start, &mut head).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.has_ended().unwrap());
        // Gone with its last user: whoever looks at the process in /proc right now is one.
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while memory.read(start, &mut head).is_ok() {
            assert!(std::time::Instant::now() < limit, "the memory of an ended process stays");
            std::thread::yield_now();
        }
        assert!(process.memory().is_err());
    }

    #[test]
    fn a_socket_pair_of_ones_own_has_no_peer() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(Process::peer_of(ours.as_fd()).unwrap().is_none());
    }
}
