//! What one sandbox may reach: parsed, checked, and asked for every flow.

use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::Ipv4Net;
use nidus_network::{EgressRules, TcpRedirect, is_denied};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::names::{Domain, host_name};

/// Bounds of a policy, so that no sandbox's rules cost the node much.
const MAX_ENTRIES: usize = 1000;
const MAX_HEADERS: usize = 64;
const MAX_DNS_SERVERS: usize = 10;
/// RFC 1929: one byte tells the length.
const MAX_CREDENTIAL: usize = 255;

/// Where the traffic of TCP goes to after it was let through.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SocksProxy {
    /// `host:port`.
    pub address: String,
    /// User name; empty for none.
    pub username: String,
    /// Password.
    pub password: String,
    /// TLS to the proxy itself.
    pub tls: Option<ProxyTls>,
}

/// How the proxy is verified.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyTls {
    /// Name in its certificate; empty for the host of its address.
    pub server_name: String,
    /// PEM certificates that replace the system's roots; empty for those.
    pub ca_cert: String,
}

impl fmt::Debug for SocksProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocksProxy").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A policy as the API has it.
#[derive(Clone)]
pub struct EgressConfig {
    /// Whether it may reach the internet at all; `false` is the same as denying 0.0.0.0/0.
    pub allow_internet: bool,
    /// Addresses and CIDRs that pass first.
    pub allowed_cidrs: Vec<String>,
    /// Addresses and CIDRs that are refused then.
    pub denied_cidrs: Vec<String>,
    /// Names that pass: `example.com`, `*.example.com` (every depth, not `example.com` itself), `*`.
    pub allowed_domains: Vec<String>,
    /// Headers that are set in HTTP requests to a domain.
    pub rules: HashMap<String, Vec<HashMap<String, String>>>,
    /// An upstream proxy for all TCP.
    pub proxy: Option<SocksProxy>,
    /// Resolvers instead of the node's.
    pub dns_servers: Option<Vec<String>>,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self {
            allow_internet: true,
            allowed_cidrs: Vec::new(),
            denied_cidrs: Vec::new(),
            allowed_domains: Vec::new(),
            rules: HashMap::new(),
            proxy: None,
            dns_servers: None,
        }
    }
}

/// What is wrong with a policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PolicyError {
    /// A header names a secret whose value was not given.
    #[error("a header in the rules names a secret that is not known")]
    Secret,
    /// An entry that is neither an IPv4 address nor a CIDR.
    #[error("{list} entry `{entry}` is not an IPv4 address or CIDR")]
    Cidr {
        /// Which list.
        list: &'static str,
        /// The entry.
        entry: String,
    },
    /// An entry that is no name.
    #[error("`{0}` is not a domain name (ASCII, international names in their xn-- form)")]
    Domain(String),
    /// A name is allowed but nothing is denied, so that it means nothing.
    #[error("allowed domains need a denied CIDR of 0.0.0.0/0: without it everything is allowed")]
    DomainsNeedDeny,
    /// Too much of something.
    #[error("at most {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// A header that cannot be set.
    #[error("header `{name}` of the rule for `{domain}` {why}")]
    Header {
        /// The rule's domain.
        domain: String,
        /// The header's name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A resolver that cannot be used.
    #[error("DNS server `{0}` is not an IPv4 address that sandboxes may reach")]
    DnsServer(String),
    /// A proxy that cannot be used.
    #[error("egress proxy `{address}`: {why}")]
    Proxy {
        /// Its address.
        address: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What becomes of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to the address that the guest named.
    ByAddress,
    /// It goes to an address of the name, which the node resolves itself.
    ByName,
    /// It is refused.
    Deny,
}

/// A checked policy. Cheap to clone. Its `Debug` shows no secret.
#[derive(Clone)]
pub struct Policy(Arc<Inner>);

#[derive(Default)]
struct Inner {
    allowed: Vec<Ipv4Net>,
    /// Without overlaps: everything is one entry.
    denied: Vec<Ipv4Net>,
    domains: Vec<Domain>,
    /// Wildcards first, so that what is said of a name itself comes last and wins.
    rules: Vec<(Domain, HeaderMap)>,
    proxy: Option<SocksProxy>,
    dns: Option<Vec<SocketAddr>>,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules: Vec<_> = self.0.rules.iter().map(|(domain, _)| domain).collect();
        f.debug_struct("Policy")
            .field("allowed", &self.0.allowed)
            .field("denied", &self.0.denied)
            .field("domains", &self.0.domains)
            .field("rules", &rules)
            .field("proxy", &self.0.proxy)
            .field("dns", &self.0.dns)
            .finish()
    }
}

fn cidrs(list: &'static str, entries: &[String]) -> Result<Vec<Ipv4Net>, PolicyError> {
    if entries.len() > MAX_ENTRIES {
        return Err(PolicyError::TooMany { what: list, limit: MAX_ENTRIES });
    }
    let parsed = entries.iter().map(|entry| {
        let net = match entry.parse::<Ipv4Addr>() {
            Ok(ip) => Ok(Ipv4Net::from(ip)),
            Err(_) => entry.parse::<Ipv4Net>(),
        };
        net.map(|net| net.trunc()).map_err(|_| PolicyError::Cidr { list, entry: entry.clone() })
    });
    Ok(Ipv4Net::aggregate(&parsed.collect::<Result<Vec<_>, _>>()?))
}

/// The headers of a rule; later maps win.
fn headers(domain: &str, maps: &[HashMap<String, String>]) -> Result<HeaderMap, PolicyError> {
    // Those that say where a message ends or goes to, by which a request could become two.
    const REFUSED: &[&str] = &[
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "upgrade",
        "te",
        "trailer",
        "keep-alive",
    ];
    let mut out = HeaderMap::new();
    for (name, value) in maps.iter().flatten() {
        let wrong = |why| PolicyError::Header { domain: domain.to_owned(), name: name.clone(), why };
        let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong("is no header name"))?;
        if REFUSED.contains(&key.as_str()) || key.as_str().starts_with("proxy-") {
            return Err(wrong("belongs to the connection and cannot be set"));
        }
        let mut value =
            HeaderValue::from_str(value).map_err(|_| wrong("has a value that no header can have"))?;
        value.set_sensitive(true);
        out.insert(key, value);
        if out.len() > MAX_HEADERS {
            return Err(PolicyError::TooMany { what: "headers in a rule", limit: MAX_HEADERS });
        }
    }
    Ok(out)
}

fn proxy(p: &SocksProxy, allowed_private: &[Ipv4Net]) -> Result<SocksProxy, PolicyError> {
    let wrong = |why: &str| PolicyError::Proxy { address: p.address.clone(), why: why.to_owned() };
    let (host, port) = p.address.rsplit_once(':').ok_or_else(|| wrong("it is not HOST:PORT"))?;
    if !port.parse::<u16>().is_ok_and(|p| p != 0) {
        return Err(wrong("its port is not a number from 1 to 65535"));
    }
    match host.parse::<Ipv4Addr>() {
        Ok(ip) if is_denied(ip, allowed_private) => {
            return Err(wrong("it lies in a range that no sandbox reaches"));
        }
        Ok(_) => {}
        Err(_) if host_name(host).is_none() => return Err(wrong("its host is no name and no IPv4 address")),
        Err(_) => {}
    }
    if p.username.len() > MAX_CREDENTIAL || p.password.len() > MAX_CREDENTIAL {
        return Err(wrong("its user name and password have at most 255 bytes"));
    }
    if p.username.is_empty() && !p.password.is_empty() {
        return Err(wrong("a password needs a user name"));
    }
    if let Some(tls) = &p.tls {
        let name = if tls.server_name.is_empty() { host } else { tls.server_name.as_str() };
        if rustls::pki_types::ServerName::try_from(name).is_err() {
            return Err(wrong("the name to verify is no server name"));
        }
        let certificates = CertificateDer::pem_slice_iter(tls.ca_cert.as_bytes());
        let good = certificates.collect::<Result<Vec<_>, _>>().is_ok_and(|found| !found.is_empty());
        if !tls.ca_cert.is_empty() && !good {
            return Err(wrong("its CA certificate is not PEM"));
        }
    }
    Ok(p.clone())
}

impl Policy {
    /// Checks a policy. `allowed_private` are the ranges that the node's owner opened.
    ///
    /// # Errors
    /// Names the entry that is wrong.
    pub fn parse(c: &EgressConfig, allowed_private: &[Ipv4Net]) -> Result<Self, PolicyError> {
        let allowed = cidrs("allowed", &c.allowed_cidrs)?;
        let mut denied = cidrs("denied", &c.denied_cidrs)?;
        if !c.allow_internet {
            denied = vec![Ipv4Net::default()];
        }
        if c.allowed_domains.len() > MAX_ENTRIES || c.rules.len() > MAX_ENTRIES {
            return Err(PolicyError::TooMany { what: "domains", limit: MAX_ENTRIES });
        }
        let domains = c.allowed_domains.iter().map(|d| Domain::parse(d)).collect::<Result<Vec<_>, _>>()?;
        if !domains.is_empty() && denied != [Ipv4Net::default()] {
            return Err(PolicyError::DomainsNeedDeny);
        }
        let mut rules = Vec::new();
        for (domain, maps) in &c.rules {
            let headers = headers(domain, maps)?;
            if !headers.is_empty() {
                rules.push((Domain::parse(domain)?, headers));
            }
        }
        rules.sort_by_key(|(domain, _)| domain.precision());
        let dns = match &c.dns_servers {
            None => None,
            Some(servers) if servers.is_empty() => None,
            Some(servers) if servers.len() > MAX_DNS_SERVERS => {
                return Err(PolicyError::TooMany { what: "DNS servers", limit: MAX_DNS_SERVERS });
            }
            Some(servers) => {
                let parse = |server: &String| match server.parse::<Ipv4Addr>() {
                    Ok(ip) if !is_denied(ip, allowed_private) => Ok(SocketAddrV4::new(ip, 53).into()),
                    _ => Err(PolicyError::DnsServer(server.clone())),
                };
                Some(servers.iter().map(parse).collect::<Result<_, _>>()?)
            }
        };
        let proxy = c.proxy.as_ref().map(|p| proxy(p, allowed_private)).transpose()?;
        Ok(Self(Arc::new(Inner { allowed, denied, domains, rules, proxy, dns })))
    }

    /// All public addresses, nothing looked at.
    pub fn open() -> Self {
        Self(Arc::default())
    }

    /// Nothing at all.
    pub fn closed() -> Self {
        Self(Arc::new(Inner { denied: vec![Ipv4Net::default()], ..Inner::default() }))
    }

    /// What becomes of a flow to an address, for a host that the client named in it. A destination that is
    /// always denied is not asked about: the caller checks what it connects to.
    pub fn decide(&self, destination: Ipv4Addr, host: Option<&str>) -> Verdict {
        if self.is_allowed(destination) {
            return Verdict::ByAddress;
        }
        if host.is_some_and(|host| self.allows_name(host)) {
            return Verdict::ByName;
        }
        if self.0.denied.iter().any(|net| net.contains(&destination)) {
            Verdict::Deny
        } else {
            Verdict::ByAddress
        }
    }

    /// Whether an address is among those that pass first.
    pub fn is_allowed(&self, ip: Ipv4Addr) -> bool {
        self.0.allowed.iter().any(|net| net.contains(&ip))
    }

    /// Whether a name is among the allowed domains. `host` as from [`host_name`].
    pub fn allows_name(&self, host: &str) -> bool {
        self.0.domains.iter().any(|d| d.matches(host))
    }

    /// Whether the guest may have a name resolved.
    pub fn resolves(&self, host: &str) -> bool {
        self.0.denied != [Ipv4Net::default()] || self.allows_name(host)
    }

    /// Whether it matters what a flow to this address says.
    pub fn looks_into(&self, destination: SocketAddrV4) -> bool {
        let by_name = !self.0.domains.is_empty() && !self.is_allowed(*destination.ip());
        let web = matches!(destination.port(), 80 | 443);
        by_name || (web && !self.0.rules.is_empty())
    }

    /// Headers to set in requests to a host, those of the most exact rule last.
    pub fn headers_for(&self, host: &str) -> Option<HeaderMap> {
        let mut found: Option<HeaderMap> = None;
        for (_, headers) in self.0.rules.iter().filter(|(domain, _)| domain.matches(host)) {
            let all = found.get_or_insert_default();
            for (name, value) in headers {
                all.insert(name, value.clone());
            }
        }
        found
    }

    /// Whether some host has headers set.
    pub fn has_rules(&self) -> bool {
        !self.0.rules.is_empty()
    }

    /// Whether the guest must trust the node's certificates.
    pub fn needs_ca(&self) -> bool {
        self.has_rules()
    }

    /// The upstream proxy.
    pub fn proxy(&self) -> Option<&SocksProxy> {
        self.0.proxy.as_ref()
    }

    /// Resolvers instead of the node's.
    pub fn dns_servers(&self) -> Option<&[SocketAddr]> {
        self.0.dns.as_deref()
    }

    /// The allowed names that are one name each.
    pub fn exact_names(&self) -> impl Iterator<Item = &str> {
        self.0.domains.iter().filter_map(Domain::exact)
    }

    /// What the kernel enforces of it.
    pub fn kernel_rules(&self) -> EgressRules {
        let i = &self.0;
        let redirect = match (i.proxy.is_some(), i.domains.is_empty(), i.rules.is_empty()) {
            (true, ..) => TcpRedirect::All,
            (false, false, false) => TcpRedirect::UnlistedAndWeb,
            (false, false, true) => TcpRedirect::Unlisted,
            (false, true, false) => TcpRedirect::Web,
            (false, true, true) => TcpRedirect::None,
        };
        EgressRules {
            allowed: i.allowed.clone(),
            denied: i.denied.clone(),
            redirect,
            dns: !i.denied.is_empty() || i.dns.is_some(),
            kept: Vec::new(),
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
