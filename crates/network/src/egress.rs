//! What a slot lets its guest reach: the part that the kernel enforces, and the sockets at which the gateway
//! takes over the rest.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsFd;

use ipnet::Ipv4Net;

use crate::NetworkError;

/// Where guests find hyperloop (RFC 5737's documentation range: nobody else is there).
pub const HYPERLOOP_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Ports of the gateway inside a namespace; a guest reaches them by redirection alone.
pub(crate) const TCP_PORT: u16 = 10_001;
pub(crate) const DNS_PORT: u16 = 10_053;
pub(crate) const HYPERLOOP_PORT: u16 = 10_080;
pub(crate) const VOLUMES_PORT: u16 = 10_049;

/// What a guest never reaches: "this network", private, shared, loopback, link-local, protocol
/// assignments, hyperloop's own, 6to4 relays, benchmarking, multicast and reserved ranges (IANA's
/// special-purpose registry, RFC 6890). The other documentation ranges are not in it: they harm nobody.
pub(crate) const DENIED: &[Ipv4Net] = &[
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 0, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 88, 99, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Whether an address lies in a range that no guest reaches, and in none that the node's owner opened.
pub fn is_denied(ip: Ipv4Addr, allowed_private: &[Ipv4Net]) -> bool {
    let within = |net: &Ipv4Net| net.contains(&ip);
    DENIED.iter().any(within) && !allowed_private.iter().any(within)
}

/// Which TCP connections of the guest the gateway takes over. Those to ranges that are always denied it
/// never gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TcpRedirect {
    /// None.
    #[default]
    None,
    /// Those to ports 80 and 443.
    Web,
    /// Those to addresses that are not in `allowed`.
    Unlisted,
    /// Those of `Web` and of `Unlisted`.
    UnlistedAndWeb,
    /// All.
    All,
}

/// What the kernel enforces for one slot. The default is open: all public addresses, nothing redirected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EgressRules {
    /// Passed first, except what is always denied.
    pub allowed: Vec<Ipv4Net>,
    /// Then refused; 0.0.0.0/0 for all that is left.
    pub denied: Vec<Ipv4Net>,
    /// TCP that goes to the gateway.
    pub redirect: TcpRedirect,
    /// Whether DNS to other addresses than `allowed` goes to the gateway.
    pub dns: bool,
    /// Connections to these that stand already go on, new ones are treated as if it was not there.
    pub kept: Vec<Ipv4Net>,
}

impl EgressRules {
    /// Nothing passes.
    pub fn nothing() -> Self {
        Self { denied: vec![Ipv4Net::default()], ..Self::default() }
    }
}

/// Sockets inside a slot's namespace. They stay in it, wherever they are served from.
#[derive(Debug)]
pub struct GatewaySockets {
    /// Redirected TCP ([`original_destination`] tells where it was to go).
    pub tcp: TcpListener,
    /// Redirected DNS.
    pub dns_udp: UdpSocket,
    /// Redirected DNS over TCP.
    pub dns_tcp: TcpListener,
    /// Hyperloop's.
    pub hyperloop: TcpListener,
    /// Of the volumes that the guest has mounted (NFS), at hyperloop's address.
    pub volumes: TcpListener,
}

impl GatewaySockets {
    /// Opens them in the calling thread's namespace.
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let listen = |port| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                .map_err(|e| NetworkError::io(format!("listen on port {port} of the slot"), e))?;
            listener
                .set_nonblocking(true)
                .map_err(|e| NetworkError::io("make a listener non-blocking", e))?;
            Ok::<_, NetworkError>(listener)
        };
        let dns_udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DNS_PORT))
            .map_err(|e| NetworkError::io(format!("open UDP port {DNS_PORT} of the slot"), e))?;
        dns_udp.set_nonblocking(true).map_err(|e| NetworkError::io("make a socket non-blocking", e))?;
        Ok(Self {
            tcp: listen(TCP_PORT)?,
            dns_udp,
            dns_tcp: listen(DNS_PORT)?,
            hyperloop: listen(HYPERLOOP_PORT)?,
            volumes: listen(VOLUMES_PORT)?,
        })
    }

    /// The same sockets once more.
    pub fn try_clone(&self) -> Result<Self, NetworkError> {
        let wrap = |e| NetworkError::io("duplicate a socket of the gateway", e);
        Ok(Self {
            tcp: self.tcp.try_clone().map_err(wrap)?,
            dns_udp: self.dns_udp.try_clone().map_err(wrap)?,
            dns_tcp: self.dns_tcp.try_clone().map_err(wrap)?,
            hyperloop: self.hyperloop.try_clone().map_err(wrap)?,
            volumes: self.volumes.try_clone().map_err(wrap)?,
        })
    }
}

/// Where a redirected connection was to go (`SO_ORIGINAL_DST`, linux/netfilter_ipv4.h).
///
/// # Errors
/// When it was not redirected, or its tracking has ended.
pub fn original_destination(socket: impl AsFd) -> std::io::Result<SocketAddrV4> {
    use std::os::fd::AsRawFd;
    const SO_ORIGINAL_DST: libc::c_int = 80;
    // SAFETY: an all-zero sockaddr_in is a valid value.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes of `address`, which both live across the call.
    let r = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_IP,
            SO_ORIGINAL_DST,
            (&raw mut address).cast(),
            &raw mut length,
        )
    };
    if r != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let ip = Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr));
    Ok(SocketAddrV4::new(ip, u16::from_be(address.sin_port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses_are_denied_unless_opened() {
        for ip in [
            "10.0.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "192.168.1.1",
            "172.31.0.1",
            "100.64.0.1",
            "192.0.2.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
        ] {
            assert!(is_denied(ip.parse().unwrap(), &[]), "{ip}");
        }
        for ip in ["8.8.8.8", "198.51.100.1", "203.0.113.9", "172.32.0.1", "11.0.0.1"] {
            assert!(!is_denied(ip.parse().unwrap(), &[]), "{ip}");
        }
        let opened = ["10.1.0.0/16".parse().unwrap()];
        assert!(!is_denied("10.1.2.3".parse().unwrap(), &opened));
        assert!(is_denied("10.2.2.3".parse().unwrap(), &opened));
    }
}
