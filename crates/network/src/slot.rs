//! A slot: names and addresses by arithmetic, and the namespace that goes with them.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::Ipv4Net;
use parking_lot::Mutex;

use crate::egress::{EgressRules, GatewaySockets, TcpRedirect};
use crate::namespace::Namespace;
use crate::nfnl::{Netfilter, SetContent};
use crate::{NetworkError, firewall, link, tap};

/// Names and ranges of a daemon's slots.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Prefix of namespaces; slot 7 is `ns-7`.
    pub namespace_prefix: String,
    /// Prefix of the host's ends of the pairs.
    pub veth_prefix: String,
    /// Name of the host's nftables table.
    pub table: String,
    /// Base of the /16 with a host address (/32) for each slot.
    pub host_range: Ipv4Addr,
    /// Base of the /16 with two addresses (/31) for each slot.
    pub pair_range: Ipv4Addr,
    /// Lowest index of this daemon, at least 1.
    pub first_index: u32,
    /// How many slots it may have.
    pub max_slots: u32,
    /// How a VMM gets its tap.
    pub tap: TapMode,
    /// Private ranges that guests may reach like public ones.
    pub allowed_private: Vec<Ipv4Net>,
    /// Bytes a second that a guest may send, and as many that it may receive; more are dropped.
    pub max_bandwidth: Option<u64>,
    /// Connections that a guest may have open at once; more are dropped.
    pub max_connections: Option<u32>,
}

/// How a VMM gets its tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapMode {
    /// As an open file that it inherits ([`NetworkSlot::open_tap`]).
    Open,
    /// By its name ([`NetworkSlot::tap_name`]), as the user id that is this number and the slot's index.
    Named {
        /// What the index is added to.
        uid_base: u32,
    },
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            namespace_prefix: "ns-".into(),
            veth_prefix: "veth-".into(),
            table: "nidus".into(),
            host_range: Ipv4Addr::new(10, 11, 0, 0),
            pair_range: Ipv4Addr::new(10, 12, 0, 0),
            first_index: 1,
            max_slots: 4096,
            tap: TapMode::Open,
            allowed_private: Vec::new(),
            max_bandwidth: None,
            max_connections: None,
        }
    }
}

/// Two addresses a slot fill a /16 here.
const INDEX_LIMIT: u32 = 32_767;

impl NetworkConfig {
    /// Checks that every index has its addresses.
    pub fn check(&self) -> Result<(), NetworkError> {
        let end = self.first_index.checked_add(self.max_slots);
        if self.first_index == 0 || self.max_slots == 0 || end.is_none_or(|e| e > INDEX_LIMIT + 1) {
            return Err(NetworkError::Config(format!(
                "slots {} and {} more do not lie within 1 to {INDEX_LIMIT}",
                self.first_index, self.max_slots
            )));
        }
        for range in [self.host_range, self.pair_range] {
            if range.to_bits() & 0xffff != 0 {
                return Err(NetworkError::Config(format!("{range} is not the base of a /16")));
            }
        }
        // IFNAMSIZ is 16 with the ending zero.
        if self.veth_prefix.len() > 10 || self.veth_prefix.is_empty() || self.namespace_prefix.is_empty() {
            return Err(NetworkError::Config("the veth prefix has 1 to 10 characters".into()));
        }
        Ok(())
    }

    /// The indices of this daemon.
    pub fn indices(&self) -> std::ops::Range<u32> {
        self.first_index..self.first_index + self.max_slots
    }

    /// Names and addresses of slot `index`.
    pub fn addresses(&self, index: u32) -> Addresses {
        let at = |base: Ipv4Addr, n: u32| Ipv4Addr::from_bits(base.to_bits() + n);
        Addresses {
            index,
            namespace: format!("{}{index}", self.namespace_prefix),
            veth: format!("{}{index}", self.veth_prefix),
            host_ip: at(self.host_range, index),
            inner_ip: at(self.pair_range, 2 * index),
            outer_ip: at(self.pair_range, 2 * index + 1),
        }
    }
}

/// Names and addresses of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// Index.
    pub index: u32,
    /// Name of the namespace.
    pub namespace: String,
    /// The host's end of the pair.
    pub veth: String,
    /// Where the host reaches the guest; NATed to it.
    pub host_ip: Ipv4Addr,
    /// `eth0` in the namespace.
    pub inner_ip: Ipv4Addr,
    /// The veth on the host.
    pub outer_ip: Ipv4Addr,
}

/// A ready network for one VM. Dropping it removes namespace, pair, tap and rules; the pool's
/// `release` does that off the caller's path.
#[derive(Debug)]
pub struct NetworkSlot {
    addresses: Addresses,
    namespace: Namespace,
    /// Nothing when the tap is opened by name.
    tap: Option<OwnedFd>,
    sockets: GatewaySockets,
    /// Nothing once its tenant is gone: what that one began late changes no rule of the next.
    netfilter: Arc<Mutex<Option<Netfilter>>>,
    /// What is in force.
    egress: Mutex<EgressRules>,
    mode: TapMode,
    pristine: Pristine,
}

/// What a slot was when it was made.
#[derive(Debug)]
struct Pristine {
    /// Its namespace's links, addresses and routes.
    state: Vec<String>,
    /// How often its rules had been changed.
    generation: u32,
}

impl NetworkSlot {
    /// Makes slot `index`. Blocks for some tens of milliseconds.
    pub(crate) fn create(config: &NetworkConfig, index: u32) -> Result<Self, NetworkError> {
        let addresses = config.addresses(index);
        let namespace = Namespace::create(&addresses.namespace)?;
        let ruleset = firewall::slot_rules(&addresses, config);
        let host = Namespace::current()?;
        let (tap, sockets, netfilter, pristine) = namespace.run({
            let (a, mode) = (addresses.clone(), config.tap);
            move || {
                set_sysctls()?;
                let tap = match mode {
                    TapMode::Open => Some(tap::create(crate::TAP_NAME)?),
                    TapMode::Named { uid_base } => {
                        tap::create_for(crate::TAP_NAME, uid_base + a.index)?;
                        None
                    }
                };
                link::configure_inside(&a, &host)?;
                firewall::apply(&a.namespace, &ruleset)?;
                let netfilter = Netfilter::open()?;
                let (state, generation) = (link::state()?, netfilter.generation()?);
                let pristine = Pristine { state, generation };
                Ok::<_, NetworkError>((tap, GatewaySockets::open()?, netfilter, pristine))
            }
        })??;
        link::configure_host(&addresses)?;
        let netfilter = Arc::new(Mutex::new(Some(netfilter)));
        let (egress, mode) = (Mutex::default(), config.tap);
        Ok(Self { addresses, namespace, tap, sockets, netfilter, egress, mode, pristine })
    }

    /// Makes it as it was: nothing of its last tenant is left, neither in the namespace nor in the connections
    /// that the host tracks; `host` is the netfilter of that. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When it is not as it was then; it must be destroyed.
    pub(crate) fn clean(self, host: &Mutex<Netfilter>) -> Result<Self, NetworkError> {
        let Self { addresses, namespace, tap, sockets, netfilter, egress: _, mode, pristine } = self;
        // Those who come late find nobody.
        drop((tap, sockets));
        let mut netfilter = netfilter.lock().take().ok_or(NetworkError::Released)?;
        let (tap, sockets, netfilter) = namespace.run({
            let a = addresses.clone();
            move || {
                // What is still on its way, if anything, goes nowhere.
                replace(&mut netfilter, &EgressRules::nothing())?;
                // A tap that a program has open cannot be made again.
                let tap = match mode {
                    TapMode::Open => Some(tap::create(crate::TAP_NAME)?),
                    TapMode::Named { uid_base } => {
                        tap::remove(crate::TAP_NAME)?;
                        tap::create_for(crate::TAP_NAME, uid_base + a.index)?;
                        None
                    }
                };
                link::configure_tap()?;
                netfilter.flush_conntrack()?;
                replace(&mut netfilter, &EgressRules::default())?;
                Ok::<_, NetworkError>((tap, GatewaySockets::open()?, netfilter))
            }
        })??;
        let netfilter = Arc::new(Mutex::new(Some(netfilter)));
        host.lock().forget(addresses.host_ip)?;
        let slot =
            Self { addresses, namespace, tap, sockets, netfilter, egress: Mutex::default(), mode, pristine };
        slot.check()?;
        Ok(slot)
    }

    /// Whether it is as it was when it was made. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`NetworkError::NotClean`] with what is not.
    pub(crate) fn check(&self) -> Result<(), NetworkError> {
        let netfilter = self.netfilter.clone();
        let (state, changes, tracked) = self.namespace.run(move || {
            let netfilter = netfilter.lock();
            let netfilter = netfilter.as_ref().ok_or(NetworkError::Released)?;
            let changes = netfilter.generation()?.wrapping_sub(netfilter.transactions());
            Ok::<_, NetworkError>((link::state()?, changes, netfilter.connections()?))
        })??;
        let unclean = |what: String| NetworkError::NotClean { slot: self.addresses.namespace.clone(), what };
        let was = &self.pristine;
        if let Some(line) = state.iter().find(|l| !was.state.contains(l)) {
            return Err(unclean(format!("{line} is in it")));
        }
        if let Some(line) = was.state.iter().find(|l| !state.contains(l)) {
            return Err(unclean(format!("{line} is no longer in it")));
        }
        if changes != was.generation {
            let n = changes.wrapping_sub(was.generation);
            return Err(unclean(format!("its rules were changed {n} times by others")));
        }
        if tracked != 0 {
            return Err(unclean(format!("{tracked} connections are tracked in it")));
        }
        Ok(())
    }

    /// Its index.
    pub fn index(&self) -> u32 {
        self.addresses.index
    }

    /// Address at which the host reaches the guest, any port.
    pub fn host_ip(&self) -> Ipv4Addr {
        self.addresses.host_ip
    }

    /// All names and addresses.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Path of the namespace, as `ip netns` shows it.
    pub fn netns_path(&self) -> &Path {
        self.namespace.path()
    }

    /// The namespace, for a process that is to enter it.
    pub fn netns(&self) -> Result<OwnedFd, NetworkError> {
        self.namespace.open()
    }

    /// The tap for a VMM (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`), attached to `tap0`.
    ///
    /// # Errors
    /// When the pool makes taps to be opened by name.
    pub fn open_tap(&self) -> Result<OwnedFd, NetworkError> {
        let tap = self.tap.as_ref().ok_or_else(|| {
            NetworkError::Config("this pool's taps are opened by their name, not inherited".into())
        })?;
        tap.try_clone().map_err(|e| NetworkError::io("duplicate the tap", e))
    }

    /// Name of the tap in the namespace.
    pub fn tap_name(&self) -> &'static str {
        crate::TAP_NAME
    }

    /// The sockets of its gateway, once more.
    pub fn gateway_sockets(&self) -> Result<GatewaySockets, NetworkError> {
        self.sockets.try_clone()
    }

    /// Replaces what its guest may reach, in one transaction; a new slot is open. What a standing connection
    /// may no longer reach is cut, the others do not notice.
    ///
    /// # Errors
    /// When the kernel refuses it; what was in force before stays so then.
    pub async fn set_egress(&self, rules: &EgressRules) -> Result<(), NetworkError> {
        if *self.egress.lock() == *rules {
            return Ok(());
        }
        let (netfilter, wanted) = (self.netfilter.clone(), rules.clone());
        tokio::task::spawn_blocking(move || {
            replace(netfilter.lock().as_mut().ok_or(NetworkError::Released)?, &wanted)
        })
        .await
        .map_err(|e| NetworkError::io("change a slot's rules", std::io::Error::other(e)))??;
        *self.egress.lock() = rules.clone();
        Ok(())
    }
}

fn replace(netfilter: &mut Netfilter, rules: &EgressRules) -> Result<(), NetworkError> {
    use crate::firewall::sets;
    let everything = [Ipv4Net::default()];
    let if_so = |on: bool| if on { &everything[..] } else { &[] };
    let (unlisted, web) = match rules.redirect {
        TcpRedirect::None | TcpRedirect::All => (false, false),
        TcpRedirect::Web => (false, true),
        TcpRedirect::Unlisted => (true, false),
        TcpRedirect::UnlistedAndWeb => (true, true),
    };
    let content = [
        (sets::ALLOWED, &rules.allowed[..]),
        (sets::DENIED, &rules.denied),
        (sets::KEPT, &rules.kept),
        (sets::TCP_ALL, if_so(rules.redirect == TcpRedirect::All)),
        (sets::TCP_UNLISTED, if_so(unlisted)),
        (sets::TCP_WEB, if_so(web)),
        (sets::DNS, if_so(rules.dns)),
    ];
    netfilter.replace(firewall::SLOT_TABLE, &content.map(|(set, ranges)| SetContent { set, ranges }))
}

/// The namespace forwards between its two interfaces, answers for nothing else and has no IPv6.
fn set_sysctls() -> Result<(), NetworkError> {
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/all/accept_redirects", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
        ("net/ipv4/conf/all/arp_ignore", "1"),
        ("net/ipv4/conf/default/arp_ignore", "1"),
        ("net/ipv4/icmp_echo_ignore_all", "1"),
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
    ] {
        let path = PathBuf::from("/proc/sys").join(name);
        match std::fs::write(&path, value) {
            Ok(()) => {}
            // A kernel without IPv6.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(NetworkError::io(format!("set {}", path.display()), e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_slots_share_a_name_or_an_address() {
        let c = NetworkConfig { max_slots: INDEX_LIMIT, ..Default::default() };
        c.check().unwrap();
        let mut seen = HashSet::new();
        for i in c.indices() {
            let a = c.addresses(i);
            for ip in [a.host_ip, a.inner_ip, a.outer_ip] {
                assert!(seen.insert(ip), "{ip} twice");
                assert!(!ip.is_broadcast() && ip.octets()[0] == 10);
            }
            // A /31: the two ends differ in the last bit alone.
            assert_eq!(a.inner_ip.to_bits() ^ a.outer_ip.to_bits(), 1);
            assert!(a.veth.len() < 16);
        }
    }

    #[test]
    fn the_contracts_addresses() {
        let a = NetworkConfig::default().addresses(1);
        assert_eq!((a.namespace.as_str(), a.veth.as_str()), ("ns-1", "veth-1"));
        assert_eq!(a.host_ip, Ipv4Addr::new(10, 11, 0, 1));
        assert_eq!(a.inner_ip, Ipv4Addr::new(10, 12, 0, 2));
        assert_eq!(a.outer_ip, Ipv4Addr::new(10, 12, 0, 3));
    }

    #[test]
    fn ranges_that_do_not_fit_are_refused() {
        let c = NetworkConfig::default();
        assert!(NetworkConfig { first_index: 0, ..c.clone() }.check().is_err());
        assert!(NetworkConfig { first_index: 32_000, max_slots: 1000, ..c.clone() }.check().is_err());
        assert!(NetworkConfig { host_range: Ipv4Addr::new(10, 11, 1, 0), ..c }.check().is_err());
    }
}
