//! The least that serves a resumed guest its memory: each missing page is copied from a file
//! (userfaultfd(2), ioctl_userfaultfd(2)).

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Deserialize;

#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const EVENT_PAGEFAULT: u8 = 0x12;

/// Serves until it is told to stop.
pub struct PageServer {
    thread: JoinHandle<io::Result<u64>>,
    stop: io::PipeWriter,
}

impl PageServer {
    pub fn start(connection: UnixStream, memory: File) -> io::Result<Self> {
        connection.set_nonblocking(false)?;
        let (stopped, stop) = io::pipe()?;
        let thread = std::thread::spawn(move || serve(&connection, &memory, &stopped));
        Ok(Self { thread, stop })
    }

    /// How many pages it has served.
    pub fn stop(self) -> io::Result<u64> {
        drop(self.stop);
        self.thread.join().unwrap()
    }
}

/// The one message: regions as JSON, the userfaultfd beside it.
fn receive(connection: &UnixStream) -> io::Result<(Vec<Region>, File)> {
    let mut text = vec![0; 64 * 1024];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut buffers = [IoSliceMut::new(&mut text)];
    let message =
        recvmsg::<()>(connection.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let fd = message.cmsgs()?.find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.ok_or_else(|| io::Error::other("no userfaultfd came"))?;
    // SAFETY: the kernel has just made this descriptor for us.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((serde_json::from_slice(&text[..length])?, uffd.into()))
}

fn serve(connection: &UnixStream, memory: &File, stopped: &io::PipeReader) -> io::Result<u64> {
    let (regions, mut uffd) = receive(connection)?;
    let mut served = 0;
    loop {
        let mut wanted =
            [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        poll(&mut wanted, PollTimeout::NONE)?;
        if wanted[1].any() == Some(true) {
            return Ok(served);
        }
        // struct uffd_msg: the event's number first, the address of a fault at 16.
        let mut event = [0u8; 32];
        match uffd.read(&mut event) {
            Ok(32) => {}
            Ok(n) => return Err(io::Error::other(format!("an event of {n} bytes"))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e),
        }
        if event[0] != EVENT_PAGEFAULT {
            return Err(io::Error::other(format!("event {:#x}", event[0])));
        }
        let address = u64::from_ne_bytes(event[16..24].try_into().unwrap());
        let region = regions
            .iter()
            .find(|r| (r.base_host_virt_addr..r.base_host_virt_addr + r.size).contains(&address))
            .ok_or_else(|| io::Error::other("a fault outside of memory"))?;
        let dst = address & !(region.page_size - 1);
        let mut page = vec![0; region.page_size as usize];
        memory.read_exact_at(&mut page, dst - region.base_host_virt_addr + region.offset)?;
        let mut copy = UffdioCopy { dst, src: page.as_ptr() as u64, len: region.page_size, mode: 0, copy: 0 };
        // SAFETY: the structure is the one of this request; the kernel checks the target.
        let r = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &mut copy) };
        match r {
            0 => served += 1,
            _ => match io::Error::last_os_error() {
                // Another fault had the same page; or the process is gone.
                e if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ESRCH)) => {}
                e => return Err(e),
            },
        }
    }
}
