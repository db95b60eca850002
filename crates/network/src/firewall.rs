//! nftables rules: one table in each namespace, one on the host. The program `nft` applies a
//! whole ruleset at a time; it runs when slots are made ahead of need. What changes while they are used are
//! the elements of sets, over netlink ([`crate::nfnl`]).

use std::io::Write;
use std::process::{Command, Stdio};

use ipnet::Ipv4Net;

use crate::egress::{DENIED, DNS_PORT, HYPERLOOP_IP, HYPERLOOP_PORT, TCP_PORT, VOLUMES_PORT};
use crate::slot::{Addresses, NetworkConfig};
use crate::{GUEST_IP, GUEST_MAC, NetworkError, TAP_NAME};

/// Name of the table in each namespace.
pub const SLOT_TABLE: &str = "nidus";

/// The sets of a slot's table, by which its policy is set while it is in use ([`crate::nfnl`]).
pub mod sets {
    /// Passed first.
    pub const ALLOWED: &str = "allowed";
    /// Then refused.
    pub const DENIED: &str = "denied";
    /// Where connections that stand go on.
    pub const KEPT: &str = "kept";
    /// All TCP to these is redirected.
    pub const TCP_ALL: &str = "tcp_all";
    /// TCP to these that are not allowed is redirected.
    pub const TCP_UNLISTED: &str = "tcp_unlisted";
    /// TCP to ports 80 and 443 of these is redirected.
    pub const TCP_WEB: &str = "tcp_web";
    /// DNS to these that are not allowed is redirected.
    pub const DNS: &str = "dns";
    /// All of them.
    pub const ALL: &[&str] = &[ALLOWED, DENIED, KEPT, TCP_ALL, TCP_UNLISTED, TCP_WEB, DNS];
}

/// A range list as nft reads it.
fn list(ranges: &[Ipv4Net]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// `ip daddr` lies where no guest may go.
fn forbidden(opened: &[Ipv4Net]) -> String {
    let denied = list(DENIED);
    match opened {
        [] => format!("ip daddr {{ {denied} }}"),
        opened => format!(
            "ip daddr {{ {denied} }} ip daddr != {{ {} }}",
            list(&Ipv4Net::aggregate(&opened.to_vec()))
        ),
    }
}

/// Rules inside a slot's namespace. Every packet of the guest is looked at, also of connections that
/// stand: so a changed set is a changed policy. What belongs to connections of the last tenant, which nobody
/// tracks any more, goes nowhere: the kernel takes a segment in the middle for a new connection
/// (`nf_conntrack_tcp_loose`), and a socket that is closed with bytes unsent still sends them.
pub fn slot_rules(a: &Addresses, c: &NetworkConfig) -> String {
    let (host_ip, guest, tap, mac) = (a.host_ip, GUEST_IP, TAP_NAME, GUEST_MAC.to_lowercase());
    let sets: String = sets::ALL
        .iter()
        .map(|name| format!("  set {name} {{ type ipv4_addr; flags interval; }}\n"))
        .collect();
    let forbidden = forbidden(&c.allowed_private);
    let (up, down) = match c.max_bandwidth {
        // A tenth of a second's worth may come at once.
        Some(rate) => {
            let limit =
                format!("limit rate over {rate} bytes/second burst {} bytes drop", (rate / 10).max(64 << 10));
            (format!("iifname {tap} {limit}"), format!("oifname {tap} {limit}"))
        }
        None => Default::default(),
    };
    let connections = c
        .max_connections
        .map(|n| format!("iifname {tap} ct state new ct count over {n} drop"))
        .unwrap_or_default();
    format!(
        "table inet {SLOT_TABLE} {{
{sets}  chain nat {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname eth0 ip daddr {host_ip} dnat ip to {guest}
    iifname {tap} ip daddr {HYPERLOOP_IP} tcp dport 80 redirect to :{HYPERLOOP_PORT}
    iifname {tap} ip daddr {HYPERLOOP_IP} tcp dport 2049 redirect to :{VOLUMES_PORT}
    iifname {tap} {forbidden} accept
    iifname {tap} meta l4proto {{ tcp, udp }} th dport 53 ip daddr @dns ip daddr != @allowed redirect to :{DNS_PORT}
    iifname {tap} meta l4proto tcp ip daddr @tcp_all redirect to :{TCP_PORT}
    iifname {tap} tcp dport {{ 80, 443 }} ip daddr @tcp_web redirect to :{TCP_PORT}
    iifname {tap} meta l4proto tcp ip daddr @tcp_unlisted ip daddr != @allowed redirect to :{TCP_PORT}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname eth0 ip saddr {guest} snat ip to {host_ip}
  }}
  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname {tap} ether saddr != {mac} drop
    iifname {tap} meta nfproto != ipv4 drop
    iifname {tap} ip saddr != {guest} drop
    {up}
  }}
  chain connections {{
    type filter hook prerouting priority mangle; policy accept;
    {connections}
    iifname eth0 tcp flags & (fin | syn | rst | ack) != syn ct state new drop
  }}
  chain shape {{
    type filter hook postrouting priority mangle; policy accept;
    {down}
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname {tap} ct status dnat tcp dport {{ {TCP_PORT}, {DNS_PORT}, {HYPERLOOP_PORT}, {VOLUMES_PORT} }} accept
    iifname {tap} ct status dnat udp dport {DNS_PORT} accept
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname {tap} ct state {{ new, invalid, untracked }} drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    iifname eth0 oifname {tap} ct status dnat accept
    iifname eth0 oifname {tap} ct direction reply ct state related accept
    iifname eth0 oifname {tap} ct direction reply ct state established jump replies
    iifname {tap} oifname eth0 ct direction reply ct state established,related accept
    iifname {tap} oifname eth0 {forbidden} drop
    iifname {tap} oifname eth0 meta nfproto ipv4 jump egress
  }}
  chain egress {{
    ip daddr @allowed accept
    ct state established ip daddr @kept accept
    ip daddr @denied goto refuse
    accept
  }}
  chain replies {{
    ip saddr @allowed accept
    ip saddr @kept accept
    ip saddr @denied drop
    accept
  }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    meta l4proto udp reject with icmp admin-prohibited
    drop
  }}
}}
"
    )
}

/// Rules on the host, for all slots of a daemon.
pub fn host_rules(c: &NetworkConfig) -> String {
    let (table, veth) = (&c.table, format!("\"{}*\"", c.veth_prefix));
    let (host_range, pair_range) = (c.host_range, c.pair_range);
    let forbidden = forbidden(&c.allowed_private);
    format!(
        "table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname {veth} ct direction reply ct state established,related accept
    iifname {veth} drop
  }}
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname {veth} ct direction reply ct state established,related accept
    iifname {veth} {forbidden} drop
    iifname {veth} oifname {veth} drop
    iifname {veth} meta nfproto ipv6 drop
    oifname {veth} ct direction reply ct state established,related accept
    oifname {veth} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname != {veth} ip saddr {{ {host_range}/16, {pair_range}/16 }} masquerade
  }}
}}
"
    )
}

/// Removes the host's table.
pub fn remove_table(table: &str) -> Result<(), NetworkError> {
    // Declaring it first makes the deletion succeed when there is none.
    apply(table, &format!("table inet {table}\ndelete table inet {table}\n"))
}

/// Applies a ruleset in the calling thread's namespace, whole or not at all.
pub fn apply(what: &str, ruleset: &str) -> Result<(), NetworkError> {
    let wrap = |e| NetworkError::io(format!("run nft for {what}"), e);
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => NetworkError::NftMissing,
            _ => wrap(e),
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(ruleset.as_bytes()).map_err(wrap)?;
    }
    let out = child.wait_with_output().map_err(wrap)?;
    if out.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    Err(NetworkError::Nft { what: what.to_owned(), message })
}
