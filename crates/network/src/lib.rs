//! Network slots of sandboxes, and the pool that makes them ahead of need.
//!
//! Every sandbox has a network namespace of its own in which the guest has the same address and
//! MAC, so that one snapshot resumes anywhere:
//!
//! ```text
//! host                              namespace ns-{idx}                          guest
//! veth-{idx} 10.12.x.x/31  <---->   eth0 10.12.x.x/31
//! route 10.11.x.x/32                  DNAT 10.11.x.x -> 169.254.0.21
//!                                   tap0 169.254.0.22/30            <---->      eth0 169.254.0.21
//! ```
//!
//! Default deny: a guest reaches the internet when its slot allows it, and never its host, another
//! sandbox, or a private or link-local address. A slot that was used is made as it was (tap, rules, connection
//! tracking, sockets), and used again only if a look at it finds nothing else.

mod egress;
mod error;
mod firewall;
mod link;
mod namespace;
mod netns_dir;
mod nfnl;
mod pool;
mod probe;
mod reclaim;
mod slot;
mod tap;

pub use egress::{EgressRules, GatewaySockets, HYPERLOOP_IP, TcpRedirect, is_denied, original_destination};
pub use error::NetworkError;
pub use pool::{Pool, PoolStats};
pub use probe::{Check, probe};
pub use reclaim::reclaim;
pub use slot::{Addresses, NetworkConfig, NetworkSlot, TapMode};

/// The guest's MAC address.
pub const GUEST_MAC: &str = "02:FC:00:00:00:05";
/// The guest's address, in every namespace.
pub const GUEST_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 21);
/// The tap's address: the guest's gateway.
pub const TAP_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 0, 22);
pub(crate) const GUEST_MAC_BYTES: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 5];
pub(crate) const TAP_MAC_BYTES: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 6];
pub(crate) const TAP_NAME: &str = "tap0";
