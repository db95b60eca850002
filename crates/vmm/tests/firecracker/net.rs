//! As much of a network slot as these tests need: a namespace with a tap of the VMM's user.

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::guest;

pub const TAP: &str = "tap0";
const HOST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
/// A guest that does not answer by then will not.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub struct Namespace(File);

fn check(r: c_int) -> io::Result<()> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: plain data, all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(ip).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of the same size.
    unsafe { std::mem::transmute(address) }
}

/// Gives an interface its address and brings it up.
pub fn configure(name: &str, ip: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = request(name);
    let call = |number, request: &libc::ifreq| {
        // SAFETY: these requests read one ifreq.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), number, request) })
    };
    request.ifr_ifru.ifru_addr = address(ip);
    call(libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_netmask = address(mask);
    call(libc::SIOCSIFNETMASK, &request)?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    call(libc::SIOCSIFFLAGS, &request)
}

impl Namespace {
    /// A new one with a persistent tap that nobody has open and that belongs to `uid`.
    pub fn new(uid: u32) -> io::Result<Self> {
        Self::with_tap(uid).map(|(namespace, _)| namespace)
    }

    /// As [`Namespace::new`], with the open tap.
    pub fn with_tap(uid: u32) -> io::Result<(Self, File)> {
        let thread = std::thread::spawn(move || {
            // SAFETY: moves only this thread, which ends after this.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
            let mut request = request(TAP);
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: reads and writes one ifreq.
            check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
            for (number, value) in [(libc::TUNSETOWNER, uid), (libc::TUNSETPERSIST, 1)] {
                // SAFETY: takes a number.
                check(unsafe { libc::ioctl(tun.as_raw_fd(), number, libc::c_ulong::from(value)) })?;
            }
            configure(TAP, HOST, MASK)?;
            Ok((Self(File::open("/proc/thread-self/ns/net")?), tun))
        });
        thread.join().unwrap()
    }

    pub fn open(&self) -> OwnedFd {
        self.0.try_clone().unwrap().into()
    }

    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let namespace = self.0.try_clone()?;
        let thread = std::thread::spawn(move || {
            // SAFETY: moves only this thread, which ends after this.
            check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
            Ok(work())
        });
        thread.join().unwrap()
    }

    /// Asks the guest in this namespace something, until it answers.
    pub fn ask(&self, question: &str) -> io::Result<String> {
        let question = question.to_owned();
        self.inside(move || {
            let end = Instant::now() + ANSWER_LIMIT;
            loop {
                match ask_once(&question) {
                    // Refused at once until it listens.
                    Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
                    result => return result,
                }
            }
        })?
    }

    /// Tells it something that it will not answer.
    pub fn tell(&self, text: &str) -> io::Result<()> {
        let text = text.to_owned();
        self.inside(move || {
            let mut stream = connect()?;
            writeln!(stream, "{text}")
        })?
    }
}

fn connect() -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&guest::ADDRESS.into(), Duration::from_secs(5))
}

fn ask_once(question: &str) -> io::Result<String> {
    let mut stream = connect()?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    writeln!(stream, "{question}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(answer.trim().to_owned()) }
}
