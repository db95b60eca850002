//! The hosts of the tests, in namespaces of their own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use nidus_network::{NetworkConfig, NetworkSlot, Pool, reclaim};

/// Port at which the hosts of the internet echo, over TCP and UDP.
pub const PORT: u16 = 7;
/// Last bytes of their addresses.
pub const ONE: u8 = 10;
pub const OTHER: u8 = 20;

fn run(args: &[&str]) {
    let out = Command::new("ip").args(args).output().unwrap();
    assert!(out.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Runs `work` on a thread in a namespace.
fn within<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        // SAFETY: the file is open; only this thread, which ends with the work, moves.
        assert_eq!(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
        work()
    })
    .join()
    .unwrap()
}

/// Two public addresses that echo.
pub struct Internet {
    name: String,
    veth: String,
    net: u8,
}

impl Internet {
    /// In 203.0.113.(32 n)/27, so that tests do not meet.
    pub fn start(name: &str, net: u8) -> Self {
        let (name, veth) = (format!("nidus-net-{name}"), format!("nnet{net}"));
        let _ = Command::new("ip").args(["netns", "del", &name]).output();
        let _ = Command::new("ip").args(["link", "del", &veth]).output();
        run(&["netns", "add", &name]);
        let this = Self { name, veth, net };
        run(&["link", "add", &this.veth, "type", "veth", "peer", "name", "up0", "netns", &this.name]);
        run(&["addr", "add", &format!("{}/27", this.ip(1)), "dev", &this.veth]);
        run(&["link", "set", &this.veth, "up"]);
        for last in [ONE, OTHER] {
            run(&["-n", &this.name, "addr", "add", &format!("{}/27", this.ip(last)), "dev", "up0"]);
        }
        run(&["-n", &this.name, "link", "set", "up0", "up"]);
        run(&["-n", &this.name, "link", "set", "lo", "up"]);
        run(&["-n", &this.name, "route", "add", "default", "via", &this.ip(1).to_string()]);
        let ips = [this.ip(ONE), this.ip(OTHER)];
        within(&this.name, move || {
            for ip in ips {
                let tcp = std::net::TcpListener::bind((ip, PORT)).unwrap();
                let udp = std::net::UdpSocket::bind((ip, PORT)).unwrap();
                std::thread::spawn(move || echo_tcp(&tcp));
                std::thread::spawn(move || echo_udp(&udp));
            }
        });
        this
    }

    /// Runs `work` on one of its hosts.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        within(&self.name, work)
    }

    pub fn ip(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, 32 * self.net + last)
    }
}

fn echo_tcp(listener: &std::net::TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
            let _ = std::io::copy(&mut from, &mut to);
        });
    }
}

fn echo_udp(socket: &std::net::UdpSocket) {
    let mut buffer = [0; 2048];
    while let Ok((n, from)) = socket.recv_from(&mut buffer) {
        let _ = socket.send_to(&buffer[..n], from);
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.veth]).output();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// A namespace with the guest's addresses; its tap and the slot's are wired together.
pub struct Guest {
    pub slot: NetworkSlot,
    name: String,
    stop: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
}

impl Guest {
    /// A pool with one slot, and a guest in it.
    pub async fn start(config: NetworkConfig, name: &str) -> (Pool, Self) {
        reclaim(&config).unwrap();
        let pool = Pool::start(config, 1).await.unwrap();
        let slot = pool.acquire().await.unwrap();
        (pool, Self::attach(slot, name))
    }

    /// A guest in a slot.
    pub fn attach(slot: NetworkSlot, name: &str) -> Self {
        let name = format!("nidus-guest-{name}");
        let _ = Command::new("ip").args(["netns", "del", &name]).output();
        run(&["netns", "add", &name]);
        let tap = within(&name, || tap("eth0"));
        let (stop, mut pumps) = (Arc::new(AtomicBool::new(false)), Vec::new());
        let outer = slot.open_tap().unwrap();
        let pairs = [(outer.try_clone().unwrap(), tap.try_clone().unwrap()), (tap, outer)];
        for (from, to) in pairs {
            let stop = stop.clone();
            pumps.push(std::thread::spawn(move || pump(from, to, &stop)));
        }
        let this = Self { slot, name, stop, pumps };
        this.ip(&["link", "set", "lo", "up"]);
        this.ip(&["link", "set", "eth0", "address", nidus_network::GUEST_MAC, "up"]);
        this.ip(&["addr", "add", &format!("{}/30", nidus_network::GUEST_IP), "dev", "eth0"]);
        this.ip(&["route", "add", "default", "via", &nidus_network::TAP_IP.to_string()]);
        this
    }

    /// `ip` inside of it.
    pub fn ip(&self, args: &[&str]) {
        run(&[&["-n", self.name.as_str()], args].concat());
    }

    /// Runs `work` as one of its programs would.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        within(&self.name, work)
    }

    /// Ends it; its slot is left.
    pub fn leave(self) -> NetworkSlot {
        self.stop.store(true, Relaxed);
        for pump in self.pumps {
            pump.join().unwrap();
        }
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
        self.slot
    }

    /// Gives everything back.
    pub async fn end(self, pool: Pool) {
        pool.release(self.leave()).await;
        pool.shutdown().await;
    }
}

/// All frames that the calling thread's namespace gets and sends from now on; does not block.
pub fn sniffer() -> File {
    let all = u32::from((libc::ETH_P_ALL as u16).to_be()) as libc::c_int;
    // SAFETY: no memory is handed over; the descriptor is new and owned by the file alone.
    unsafe {
        let fd =
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, all);
        assert!(fd >= 0, "open a packet socket: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

/// How many segments of a connection were sent more than once; nothing when it is closed (`TCP_INFO`, linux/tcp.h).
pub fn sent_again(stream: &std::net::TcpStream) -> Option<u32> {
    const TCP_CLOSE: u8 = 7;
    // SAFETY: an all-zero tcp_info is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (to, fd) = ((&raw mut info).cast(), stream.as_raw_fd());
    // SAFETY: the kernel writes at most `length` bytes of `info`, which both live across the call.
    let r = unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, to, &raw mut length) };
    assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
    (info.tcpi_state != TCP_CLOSE).then_some(info.tcpi_total_retrans)
}

/// Frames from one tap to the other.
fn pump(from: OwnedFd, to: OwnedFd, stop: &AtomicBool) {
    let (mut from, mut to) = (File::from(from), File::from(to));
    let mut frame = vec![0; 70_000];
    while !stop.load(Relaxed) {
        let mut wait = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives across the call.
        if unsafe { libc::poll(&raw mut wait, 1, 50) } <= 0 {
            continue;
        }
        match from.read(&mut frame) {
            // A link that is down takes nothing.
            Ok(n) => drop(to.write(&frame[..n])),
            Err(_) => return,
        }
    }
}

fn tap(name: &str) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    file.into()
}
