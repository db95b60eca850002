//! nftables rules: one table in each namespace, one on the host. The program `nft` applies a
//! whole ruleset at a time; it runs when slots are made ahead of need, not when they are used.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::slot::{Addresses, NetworkConfig};
use crate::{GUEST_IP, GUEST_MAC, NetworkError, TAP_NAME};

/// What a guest never reaches: "this network", private, shared, loopback, link-local, protocol
/// assignments, benchmarking, multicast and reserved ranges (IANA's special-purpose registry,
/// RFC 6890). Documentation ranges are not in it: they harm nobody.
const DENIED: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, \
192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/4, 240.0.0.0/4";

/// Rules inside a slot's namespace.
pub fn slot_rules(a: &Addresses) -> String {
    let (host_ip, guest, tap, mac) = (a.host_ip, GUEST_IP, TAP_NAME, GUEST_MAC.to_lowercase());
    format!(
        "table inet nidus {{
  chain internet {{ accept; }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname eth0 ip daddr {host_ip} dnat ip to {guest}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname eth0 ip saddr {guest} snat ip to {host_ip}
  }}
  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname {tap} ether saddr != {mac} drop
    iifname {tap} ip saddr != {guest} drop
    iifname {tap} meta nfproto ipv6 drop
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    iifname eth0 oifname {tap} ct status dnat accept
    iifname eth0 oifname {tap} ct direction reply ct state established,related accept
    iifname {tap} oifname eth0 ct direction reply ct state established,related accept
    iifname {tap} oifname eth0 ip daddr {{ {DENIED} }} drop
    iifname {tap} oifname eth0 meta nfproto ipv4 jump internet
  }}
}}
"
    )
}

/// Replaces the internet policy of a slot. Connections that stand are cut by it too, since
/// only their replies pass without it.
pub fn internet_rules(allow: bool) -> String {
    let verdict = if allow { "accept" } else { "drop" };
    format!("flush chain inet nidus internet\nadd rule inet nidus internet {verdict}\n")
}

/// Rules on the host, for all slots of a daemon.
pub fn host_rules(c: &NetworkConfig) -> String {
    let (table, veth) = (&c.table, format!("\"{}*\"", c.veth_prefix));
    let (host_range, pair_range) = (c.host_range, c.pair_range);
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
    iifname {veth} ip daddr {{ {DENIED} }} drop
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
