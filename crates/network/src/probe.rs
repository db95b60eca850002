//! Whether slots can be made here, found out by making their parts.

use crate::namespace::Namespace;
use crate::{firewall, tap};

/// Result of one check.
#[derive(Debug, Clone)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// The error, when it does not work.
    pub error: Option<String>,
    /// What to do then.
    pub fix: &'static str,
}

/// Makes a namespace, a tap and a ruleset in it, and removes them.
pub fn probe() -> Vec<Check> {
    let name = format!("nidus-probe-{}", std::process::id());
    let namespace = Namespace::create(&name);
    let mut checks = vec![Check {
        name: "network namespaces",
        error: namespace.as_ref().err().map(ToString::to_string),
        fix: "run as root on a kernel with CONFIG_NET_NS",
    }];
    let Ok(namespace) = namespace else { return checks };
    let parts = namespace.run(|| {
        let tap = tap::create("tap0").err().map(|e| e.to_string());
        let rules = "table inet probe {\n chain c {\n type nat hook postrouting priority srcnat\n masquerade\n }\n}\n";
        let nft = firewall::apply("the probe", rules).err().map(|e| e.to_string());
        (tap, nft)
    });
    let (tap, nft) = parts.unwrap_or_else(|e| (Some(e.to_string()), Some(e.to_string())));
    checks.push(Check { name: "tap devices", error: tap, fix: "modprobe tun; /dev/net/tun must be there" });
    checks.push(Check {
        name: "nftables",
        error: nft,
        fix: "apt-get install nftables; modprobe nf_tables nft_nat",
    });
    checks
}
