//! The kernel's userfaultfd calls, as in Documentation/admin-guide/mm/userfaultfd.rst and
//! `linux/userfaultfd.h`.
//!
//! Own declarations, because the `userfaultfd` crate needs libclang to build.

use std::{
    fs, io,
    io::IoSliceMut,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::errno::Errno;
use rustix::io::ReadWriteFlags;

/// Bits of `uffdio_api.features`.
pub(super) mod feature {
    pub(crate) const EVENT_FORK: u64 = 1 << 1;
    pub(crate) const EVENT_REMOVE: u64 = 1 << 3;
    pub(crate) const SIGBUS: u64 = 1 << 7;
    pub(crate) const WP_ASYNC: u64 = 1 << 15;
    /// Not part of the interface's features: the kernel's own mark that UFFDIO_API was called.
    pub(crate) const INITIALIZED: u64 = 1 << 31;
}

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
pub struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
pub struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
pub struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
pub struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, UffdioRegister);
nix::ioctl_read!(uffdio_wake, 0xAA, 0x02, UffdioRange);
nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, UffdioCopy);
nix::ioctl_readwrite!(uffdio_zeropage, 0xAA, 0x04, UffdioZeropage);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xAA, 0x06, UffdioWriteprotect);

/// What one `read` of the descriptor tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A thread of the process waits for the page at this address.
    Fault {
        /// Within the page, or its start.
        address: u64,
        /// It wants to write.
        write: bool,
        /// The page is there, but write-protected.
        protected: bool,
    },
    /// The process gives up the content of these pages; it waits until this event is read, then
    /// drops them.
    Remove { start: u64, end: u64 },
    /// The process has unmapped these addresses.
    Unmap { start: u64, end: u64 },
    /// The process has moved a mapping.
    Remap { from: u64, to: u64 },
    /// The process has forked; the event brought a descriptor, which is closed.
    Fork,
    /// An event that this code does not know.
    Unknown(u8),
}

/// The size of `struct uffd_msg`.
pub(super) const EVENT_LEN: usize = 32;

/// How far a copy or a zero fill came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fill {
    /// Bytes from the start that are in place and whose waiters were woken.
    pub(super) done: u64,
    /// What stopped it short of its end.
    pub(super) stop: Option<Errno>,
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub(super) struct Uffd {
    fd: OwnedFd,
    features: u64,
    /// Whether the kernel knows a read of it that does not wait (Linux 6.10). Older kernels have
    /// only O_NONBLOCK, which the process, sharing the open file, may take away.
    nowait: AtomicBool,
}

impl Uffd {
    /// Accepts a descriptor if it is a userfaultfd on which UFFDIO_API was called, and sets
    /// O_NONBLOCK. `None` if it is something else.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Option<Self>> {
        let number = fd.as_raw_fd();
        if fs::read_link(format!("/proc/self/fd/{number}"))?.as_os_str() != "anon_inode:[userfaultfd]" {
            return Ok(None);
        }
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        // "API:\taa:FEATURES:IOCTLS" in hexadecimal digits.
        let features = info
            .lines()
            .find_map(|line| line.strip_prefix("API:")?.trim().split(':').nth(1))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| io::Error::other("its fdinfo has no API line"))?;
        if features & feature::INITIALIZED == 0 {
            return Ok(None);
        }
        let uffd = Self { fd, features, nowait: AtomicBool::new(true) };
        uffd.set_nonblocking()?;
        Ok(Some(uffd))
    }

    /// The features that the process asked for.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
        let flags = fcntl_getfl(&self.fd)?;
        Ok(fcntl_setfl(&self.fd, flags | OFlags::NONBLOCK)?)
    }

    /// Reads what has happened, without waiting: an empty result if nothing has.
    pub(super) fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<impl Iterator<Item = Event> + use<'a>> {
        let len = loop {
            let result = if self.nowait.load(Ordering::Relaxed) {
                // The offset stands for "none".
                let mut to = [IoSliceMut::new(buffer)];
                rustix::io::preadv2(&self.fd, &mut to, u64::MAX, ReadWriteFlags::NOWAIT)
            } else {
                rustix::io::read(&self.fd, &mut *buffer)
            };
            match result {
                Ok(len) => break len,
                Err(rustix::io::Errno::AGAIN) => break 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::SPIPE)
                    if self.nowait.swap(false, Ordering::Relaxed) => {}
                Err(error) => return Err(error.into()),
            }
        };
        Ok(buffer[..len.min(buffer.len())].as_chunks::<EVENT_LEN>().0.iter().map(parse_event))
    }

    /// Puts `bytes` at address `to`, where no page must be, and wakes who waits for it. Both in
    /// whole pages of the mapping.
    pub(super) fn copy(&self, to: u64, bytes: &[u8]) -> Fill {
        let len = bytes.len() as u64;
        let mut args = UffdioCopy { dst: to, src: bytes.as_ptr() as u64, len, mode: 0, copy: 0 };
        // SAFETY: the descriptor is open and `args` has the layout of `struct uffdio_copy`. The
        // kernel writes to the other process's memory and, here, to `args` alone.
        let result = unsafe { uffdio_copy(self.fd.as_raw_fd(), &mut args) };
        fill(result, args.copy, len)
    }

    /// Puts pages of zeros at address `to`, where no page must be, and wakes who waits for it.
    /// Not for huge pages.
    pub(super) fn zero(&self, to: u64, len: u64) -> Fill {
        let mut args = UffdioZeropage { range: UffdioRange { start: to, len }, mode: 0, zeropage: 0 };
        // SAFETY: as in `copy`, with `struct uffdio_zeropage`.
        let result = unsafe { uffdio_zeropage(self.fd.as_raw_fd(), &mut args) };
        fill(result, args.zeropage, len)
    }

    /// Wakes the threads that wait for pages in this range; they look again.
    pub(super) fn wake(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut range = UffdioRange { start, len };
        // SAFETY: the descriptor is open and `range` has the layout of `struct uffdio_range`; the
        // kernel only reads it.
        unsafe { uffdio_wake(self.fd.as_raw_fd(), &mut range) }.map(drop)
    }

    /// Write-protects the pages that are present in the range, or lifts that and wakes who waits.
    pub(super) fn write_protect(&self, start: u64, len: u64, protect: bool) -> Result<(), Errno> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut args = UffdioWriteprotect { range: UffdioRange { start, len }, mode };
        // SAFETY: the descriptor is open and `args` has the layout of `struct uffdio_writeprotect`.
        unsafe { uffdio_writeprotect(self.fd.as_raw_fd(), &mut args) }.map(drop)
    }

    /// Registers a range, in the process that made the descriptor, for missing pages and for
    /// writes to protected ones. A range that is registered for less is thereby registered for both.
    pub(super) fn register_for_write_protect(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mode = REGISTER_MODE_MISSING | REGISTER_MODE_WP;
        let mut args = UffdioRegister { range: UffdioRange { start, len }, mode, ioctls: 0 };
        // SAFETY: the descriptor is open and `args` has the layout of `struct uffdio_register`.
        unsafe { uffdio_register(self.fd.as_raw_fd(), &mut args) }.map(drop)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn fill(result: nix::Result<i32>, done: i64, len: u64) -> Fill {
    match result {
        Ok(_) => Fill { done: len, stop: None },
        // On an error the kernel says how far it came, or repeats the error as a negative number.
        Err(errno) => Fill { done: u64::try_from(done).unwrap_or(0).min(len), stop: Some(errno) },
    }
}

/// Reads a `struct uffd_msg`. A descriptor that came with it is closed.
fn parse_event(message: &[u8; EVENT_LEN]) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        0x12 => {
            let flags = word(8);
            Event::Fault { address: word(16), write: flags & 1 != 0, protected: flags & 2 != 0 }
        }
        0x13 => {
            let fd = word(8) as u32 as i32;
            if fd > 2 {
                // SAFETY: the kernel has just installed this descriptor for the reader of the
                // event, and this is the only place that takes it.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Event::Fork
        }
        0x14 => Event::Remap { from: word(8), to: word(16) },
        0x15 => Event::Remove { start: word(8), end: word(16) },
        0x16 => Event::Unmap { start: word(8), end: word(16) },
        other => Event::Unknown(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u8, words: [u64; 3]) -> [u8; EVENT_LEN] {
        let mut message = [0; EVENT_LEN];
        message[0] = event;
        for (to, word) in message[8..].chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        message
    }

    #[test]
    fn messages_of_all_kinds_are_read() {
        let fault = |flags| parse_event(&message(0x12, [flags, 0x7000, 9]));
        assert_eq!(fault(0), Event::Fault { address: 0x7000, write: false, protected: false });
        assert_eq!(fault(3), Event::Fault { address: 0x7000, write: true, protected: true });
        assert_eq!(parse_event(&message(0x14, [1, 2, 3])), Event::Remap { from: 1, to: 2 });
        assert_eq!(parse_event(&message(0x15, [1, 2, 0])), Event::Remove { start: 1, end: 2 });
        assert_eq!(parse_event(&message(0x16, [1, 2, 0])), Event::Unmap { start: 1, end: 2 });
        assert_eq!(parse_event(&message(0x77, [0; 3])), Event::Unknown(0x77));
    }

    #[test]
    fn how_far_a_fill_came() {
        assert_eq!(fill(Ok(0), 8192, 8192), Fill { done: 8192, stop: None });
        let again = Some(Errno::EAGAIN);
        assert_eq!(fill(Err(Errno::EAGAIN), 4096, 8192), Fill { done: 4096, stop: again });
        assert_eq!(fill(Err(Errno::EAGAIN), -11, 8192), Fill { done: 0, stop: again });
    }

    #[test]
    fn other_descriptors_are_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(Uffd::new(file.into()).unwrap().is_none());
    }
}
