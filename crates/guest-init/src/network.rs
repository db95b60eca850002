//! The one network interface: same address, MAC and gateway in every guest (contract: network
//! slot), so that a snapshot resumes in any namespace.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::Failure;

const INTERFACE: &str = "eth0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
const GATEWAY_MAC: [u8; 6] = [0x02, 0xfc, 0x00, 0x00, 0x00, 0x06];

/// Sets address, route and the gateway's MAC (fixed: a resumed guest asks nobody) and brings
/// loopback and the interface up.
pub fn up() -> Result<(), Failure> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| Failure::new("open a socket", e))?;
    flags_up(&control, "lo")?;
    if !std::path::Path::new("/sys/class/net").join(INTERFACE).exists() {
        return Err(Failure::new(format!("find {INTERFACE}"), "no such interface"));
    }
    // IPv6 leads nowhere there, and programs would wait for it in vain. Loopback keeps it: what binds
    // to "localhost" may take ::1.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6"), "1");
    let mut request = request(INTERFACE);
    request.ifr_ifru.ifru_addr = address(ADDRESS);
    call(&control, libc::SIOCSIFADDR, &raw mut request, "set the address")?;
    request.ifr_ifru.ifru_netmask = address(NETMASK);
    call(&control, libc::SIOCSIFNETMASK, &raw mut request, "set the netmask")?;
    flags_up(&control, INTERFACE)?;
    // SAFETY: rtentry is plain data, all zeros is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address(GATEWAY);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    call(&control, libc::SIOCADDRT, &raw mut route, "add the default route")?;
    // SAFETY: arpreq is plain data, all zeros is a valid value.
    let mut arp: libc::arpreq = unsafe { std::mem::zeroed() };
    arp.arp_pa = address(GATEWAY);
    arp.arp_ha.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in arp.arp_ha.sa_data.iter_mut().zip(GATEWAY_MAC) {
        *to = from.cast_signed();
    }
    arp.arp_flags = libc::ATF_PERM | libc::ATF_COM;
    for (to, from) in arp.arp_dev.iter_mut().zip(INTERFACE.bytes()) {
        *to = from.cast_signed();
    }
    call(&control, libc::SIOCSARP, &raw mut arp, "set the gateway's MAC")
}

fn flags_up(control: &OwnedFd, interface: &str) -> Result<(), Failure> {
    let mut request = request(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    call(control, libc::SIOCSIFFLAGS, &raw mut request, "bring the interface up")
}

fn request(interface: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// An IPv4 address as a `sockaddr`: port 0, then the address in network order.
fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// netdevice(7), route(8), arp(7): requests that take a pointer to their own structure.
fn call<T>(control: &OwnedFd, code: libc::c_ulong, argument: *mut T, action: &str) -> Result<(), Failure> {
    // SAFETY: the callers pair each code with the structure that it takes, which outlives the call.
    match unsafe { libc::ioctl(control.as_raw_fd(), code as _, argument) } {
        0 => Ok(()),
        _ => Err(Failure::new(action, std::io::Error::last_os_error())),
    }
}
