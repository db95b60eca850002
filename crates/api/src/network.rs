//! The network part of a sandbox: from the contract's JSON to the node's configuration and back.
//!
//! What is checked here is what E2B's API checks, with its words where clients compare them; the node checks
//! everything once more when it makes a policy of it.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::extract::{Path, State};
use http::StatusCode;
use nidus_proto::node::{
    SandboxConfig, SandboxNetworkConfig, SandboxNetworkDnsServers, SandboxNetworkDomainRules,
    SandboxNetworkEgressConfig, SandboxNetworkEgressProxyTls, SandboxNetworkIngressConfig,
    SandboxNetworkRule, SandboxNetworkTransform, SandboxUpdateRequest,
};
use tonic::Code;

use crate::auth::Team;
use crate::input::Input;
use crate::model::{EgressProxy, EgressProxyTls, Network, NetworkRule, NetworkTransform, NetworkUpdate};
use crate::sandboxes::{not_found, secret, shown};
use crate::{Api, ApiError, pause};

/// All addresses: what a policy denies so that only what it allows is left.
const EVERYTHING: &str = "0.0.0.0/0";

/// Most entries of a list of addresses or names.
const MAX_ENTRIES: usize = 1000;
/// E2B's bounds of rules.
const MAX_RULE_DOMAINS: usize = 10;
const MAX_HEADERS: usize = 20;
const MAX_DNS_SERVERS: usize = 10;
/// Bytes of a proxy's certificates (SDK).
const MAX_CA_BYTES: usize = 8192;

/// The egress part of a creation or an update.
#[derive(Debug, Default)]
struct Egress {
    allow_out: Vec<String>,
    deny_out: Vec<String>,
    proxy: Option<EgressProxy>,
    dns_servers: Option<Vec<String>>,
    rules: HashMap<String, Vec<NetworkRule>>,
}

/// What a new sandbox asks for.
pub fn of_new(network: Option<Network>) -> Result<Option<SandboxNetworkConfig>, ApiError> {
    let Some(n) = network else { return Ok(None) };
    let egress = egress(Egress {
        allow_out: n.allow_out.unwrap_or_default(),
        deny_out: n.deny_out.unwrap_or_default(),
        proxy: n.egress_proxy,
        dns_servers: n.dns_servers,
        rules: n.rules.unwrap_or_default(),
    })?;
    let mask = n.mask_request_host.filter(|m| !m.is_empty());
    if let Some(mask) = &mask {
        check_mask(mask)?;
    }
    let ingress = SandboxNetworkIngressConfig {
        traffic_access_token: if n.allow_public_traffic == Some(false) { Some(secret()?) } else { None },
        mask_request_host: mask,
        https_ports: n.https_ports.unwrap_or_default().into_iter().map(u32::from).collect(),
    };
    Ok(Some(SandboxNetworkConfig { egress: Some(egress), ingress: Some(ingress) }))
}

fn check_mask(mask: &str) -> Result<(), ApiError> {
    if !mask.is_ascii() {
        return Err(ApiError::bad(format!(
            "mask request host '{}' is not ASCII. Please use ASCII characters only.",
            shown(mask)
        )));
    }
    let (host, port) = mask.rsplit_once(':').map_or((mask, None), |(h, p)| (h, Some(p)));
    let bad_port = port.is_some_and(|p| p != "${PORT}" && p.parse::<u16>().is_err());
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._${}".contains(&b);
    if mask.len() > 255 || host.is_empty() || bad_port || !host.bytes().all(plain) {
        return Err(ApiError::bad(format!("mask request host is not valid: {}", shown(mask))));
    }
    Ok(())
}

/// Whether an entry is meant as an address rather than a name.
fn is_address(text: &str) -> bool {
    let base = text.split('/').next().unwrap_or_default();
    text.contains(':')
        || text.contains('/')
        || base
            .rsplit('.')
            .next()
            .is_some_and(|last| !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}

/// An IPv4 address or CIDR.
fn is_cidr(text: &str) -> bool {
    let (base, length) = text.split_once('/').map_or((text, None), |(b, l)| (b, Some(l)));
    base.parse::<Ipv4Addr>().is_ok()
        && length.is_none_or(|l| !l.starts_with('+') && l.parse::<u8>().is_ok_and(|l| l <= 32))
}

fn egress(asked: Egress) -> Result<SandboxNetworkEgressConfig, ApiError> {
    let Egress { allow_out, deny_out, proxy, dns_servers, rules } = asked;
    if allow_out.len() > MAX_ENTRIES || deny_out.len() > MAX_ENTRIES {
        return Err(ApiError::bad(format!("allowOut and denyOut have at most {MAX_ENTRIES} entries")));
    }
    if let Some(wrong) = deny_out.iter().find(|d| !is_cidr(d)) {
        return Err(ApiError::bad(format!("invalid denied CIDR {}", shown(wrong))));
    }
    let (allowed_cidrs, allowed_domains): (Vec<_>, Vec<_>) =
        allow_out.into_iter().partition(|entry| is_address(entry));
    if let Some(wrong) = allowed_cidrs.iter().find(|a| !is_cidr(a)) {
        return Err(ApiError::bad(format!("invalid allowed address {}", shown(wrong))));
    }
    if !allowed_domains.is_empty() && !deny_out.iter().any(|d| d == EVERYTHING) {
        return Err(ApiError::bad(
            "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in deny out to block all other traffic.",
        ));
    }
    if let Some(servers) = &dns_servers {
        let wrong = servers.iter().find(|s| s.parse::<Ipv4Addr>().is_err());
        if let Some(wrong) = wrong {
            return Err(ApiError::bad(format!("DNS server {} is not an IPv4 address", shown(wrong))));
        }
        if servers.len() > MAX_DNS_SERVERS {
            return Err(ApiError::bad(format!("dnsServers has at most {MAX_DNS_SERVERS} entries")));
        }
    }
    let (address, username, password, tls) = match proxy {
        None => Default::default(),
        Some(p) => checked_proxy(p)?,
    };
    Ok(SandboxNetworkEgressConfig {
        allowed_cidrs,
        denied_cidrs: deny_out,
        allowed_domains,
        rules: checked_rules(rules)?,
        egress_proxy_address: address,
        egress_proxy_username: username,
        egress_proxy_password: password,
        egress_proxy_tls: tls,
        dns_servers: dns_servers.map(|addresses| SandboxNetworkDnsServers { addresses }),
        secrets: HashMap::new(),
    })
}

type Proxy = (String, String, String, Option<SandboxNetworkEgressProxyTls>);

fn checked_proxy(p: EgressProxy) -> Result<Proxy, ApiError> {
    let bad = |what: &str| Err(ApiError::bad(format!("Invalid egress proxy config: {what}")));
    let (username, password) = (p.username.unwrap_or_default(), p.password.unwrap_or_default());
    if username.len() > 255 || password.len() > 255 {
        return bad("user name and password have at most 255 bytes");
    }
    if username.is_empty() && !password.is_empty() {
        return bad("a password needs a user name");
    }
    let parts = p.address.rsplit_once(':');
    if !parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0)) {
        return bad(&format!("'{}' is not HOST:PORT", shown(&p.address)));
    }
    let tls = p.tls.filter(|t| t.enabled != Some(false)).map(|t| SandboxNetworkEgressProxyTls {
        server_name: t.server_name.unwrap_or_default(),
        ca_cert: t.ca_cert.unwrap_or_default(),
    });
    if tls.as_ref().is_some_and(|t| t.server_name.len() > 253 || t.ca_cert.len() > MAX_CA_BYTES) {
        return bad(&format!("serverName has at most 253 characters and caCert {MAX_CA_BYTES} bytes"));
    }
    Ok((p.address, username, password, tls))
}

fn checked_rules(
    rules: HashMap<String, Vec<NetworkRule>>,
) -> Result<HashMap<String, SandboxNetworkDomainRules>, ApiError> {
    if rules.len() > MAX_RULE_DOMAINS {
        return Err(ApiError::bad(format!("Network rules can have at most {MAX_RULE_DOMAINS} domains.")));
    }
    let mut checked = HashMap::new();
    for (domain, list) in rules {
        let plain = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if domain.len() > 128 || !domain.strip_prefix("*.").unwrap_or(&domain).split('.').all(plain) {
            return Err(ApiError::bad(format!(
                "Rule domain \"{}\" is not a valid domain name.",
                shown(&domain)
            )));
        }
        let mut out = Vec::new();
        for rule in list {
            let headers = rule.transform.and_then(|t| t.headers).unwrap_or_default();
            if headers.len() > MAX_HEADERS {
                return Err(ApiError::bad(format!(
                    "Domain \"{domain}\" can have at most {MAX_HEADERS} headers per rule."
                )));
            }
            for (name, value) in &headers {
                check_header(&domain, name, value)?;
            }
            out.push(SandboxNetworkRule { transform: Some(SandboxNetworkTransform { headers }) });
        }
        checked.insert(domain, SandboxNetworkDomainRules { rules: out });
    }
    Ok(checked)
}

fn check_header(domain: &str, name: &str, value: &str) -> Result<(), ApiError> {
    let bad = |what: &str| {
        Err(ApiError::bad(format!("Header name \"{}\" in rule for domain \"{domain}\" {what}.", shown(name))))
    };
    if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
        return bad("must contain only valid HTTP token characters");
    }
    if name.len() > 64 {
        return bad("exceeds maximum length of 64 characters");
    }
    if value.len() > 2048 || http::HeaderValue::from_str(value).is_err() {
        return bad("has a value with line ends or of more than 2048 characters");
    }
    // The gateway puts secrets in their place; there are no other placeholders here.
    if value.replace("${e2b.secrets.", "").contains("${e2b.") {
        return Err(ApiError::not_yet("A workload identity token in network.rules"));
    }
    Ok(())
}

/// What a client may see of it again: no password, no certificate.
pub fn of_config(c: &SandboxConfig) -> Option<Network> {
    let n = c.network.as_ref()?;
    let list = |v: Vec<String>| (!v.is_empty()).then_some(v);
    let (egress, ingress) = (n.egress.clone().unwrap_or_default(), n.ingress.clone().unwrap_or_default());
    let proxy = (!egress.egress_proxy_address.is_empty()).then(|| EgressProxy {
        address: egress.egress_proxy_address,
        username: Some(egress.egress_proxy_username).filter(|u| !u.is_empty()),
        password: None,
        tls: egress.egress_proxy_tls.map(|t| EgressProxyTls {
            enabled: Some(true),
            server_name: Some(t.server_name).filter(|n| !n.is_empty()),
            ca_cert: None,
        }),
    });
    let rules =
        egress.rules.into_iter().map(|(domain, list)| (domain, list.rules.into_iter().map(rule).collect()));
    let rules: HashMap<_, _> = rules.collect();
    let ports: Vec<u16> = ingress.https_ports.iter().filter_map(|p| u16::try_from(*p).ok()).collect();
    Some(Network {
        allow_public_traffic: Some(ingress.traffic_access_token.is_none()),
        allow_out: list([egress.allowed_cidrs, egress.allowed_domains].concat()),
        deny_out: list(egress.denied_cidrs),
        dns_servers: egress.dns_servers.map(|s| s.addresses),
        egress_proxy: proxy,
        mask_request_host: ingress.mask_request_host,
        https_ports: (!ports.is_empty()).then_some(ports),
        rules: (!rules.is_empty()).then_some(rules),
    })
}

fn rule(r: SandboxNetworkRule) -> NetworkRule {
    NetworkRule { transform: r.transform.map(|t| NetworkTransform { headers: Some(t.headers) }) }
}

impl Api {
    async fn update_network(&self, team: &Team, id: &str, update: NetworkUpdate) -> Result<(), ApiError> {
        if self.running(team, id).await?.is_none() {
            return Err(match self.paused(team, id).await? {
                Some(_) => pause::conflict(format!("Sandbox \"{}\" is paused: resume it first", shown(id))),
                None => not_found(id),
            });
        }
        let mut denied = update.deny_out.unwrap_or_default();
        if update.allow_internet_access == Some(false) && !denied.iter().any(|d| d == EVERYTHING) {
            denied.push(EVERYTHING.to_owned());
        }
        let mut egress = egress(Egress {
            allow_out: update.allow_out.unwrap_or_default(),
            deny_out: denied,
            proxy: update.egress_proxy,
            dns_servers: update.dns_servers,
            rules: update.rules.unwrap_or_default(),
        })?;
        self.fill_secrets(&team.id, &mut egress).await?;
        let request =
            SandboxUpdateRequest { sandbox_id: id.to_owned(), end_time: None, egress: Some(egress) };
        match self.nodes.sandboxes().update(request).await {
            Ok(_) => Ok(()),
            Err(s) if s.code() == Code::NotFound => Err(not_found(id)),
            Err(s) => Err(s.into()),
        }
    }
}

/// `PUT /sandboxes/{id}/network`: replaces the whole egress policy; what is left out is cleared.
pub async fn update(
    State(api): State<Arc<Api>>,
    team: Team,
    Path(id): Path<String>,
    Input(request): Input<NetworkUpdate>,
) -> Result<StatusCode, ApiError> {
    pause::to_its_end(async move {
        let _turn = api.turns.take(&id).await;
        api.update_network(&team, &id, request).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(json: &str) -> Result<SandboxNetworkConfig, String> {
        let n: Network = serde_json::from_str(json).unwrap();
        of_new(Some(n)).map(Option::unwrap).map_err(|e| e.message)
    }

    #[test]
    fn addresses_and_names_are_told_apart() {
        let n = network(
            r#"{"allowOut": ["1.1.1.1", "8.8.8.0/24", "a.example", "*.b.example", "*", "1e100.net"],
                "denyOut": ["0.0.0.0/0"]}"#,
        );
        let egress = n.unwrap().egress.unwrap();
        assert_eq!(egress.allowed_cidrs, ["1.1.1.1", "8.8.8.0/24"]);
        assert_eq!(egress.allowed_domains, ["a.example", "*.b.example", "*", "1e100.net"]);
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        for (json, part) in [
            (r#"{"denyOut": ["example.com"]}"#, "invalid denied CIDR example.com"),
            (r#"{"denyOut": ["::/0"]}"#, "invalid denied CIDR"),
            (r#"{"allowOut": ["1.2.3.4/33"]}"#, "invalid allowed address"),
            (r#"{"allowOut": ["1.2.3"]}"#, "invalid allowed address"),
            (r#"{"allowOut": ["300.1.1.1"]}"#, "invalid allowed address"),
            (r#"{"allowOut": ["a.example"]}"#, "ALL_TRAFFIC"),
            (r#"{"dnsServers": ["dns.example"]}"#, "not an IPv4 address"),
            (r#"{"egressProxy": {"address": "proxy"}}"#, "HOST:PORT"),
            (r#"{"egressProxy": {"address": "p:1", "password": "x"}}"#, "needs a user name"),
            (r#"{"rules": {"a b": []}}"#, "not a valid domain"),
            (r#"{"rules": {"a": [{"transform": {"headers": {"x y": "1"}}}]}}"#, "token characters"),
            (r#"{"rules": {"a": [{"transform": {"headers": {"x": "1\r\ny: 2"}}}]}}"#, "line ends"),
            (r#"{"maskRequestHost": "a/b"}"#, "mask request host is not valid"),
            (r#"{"maskRequestHost": "ä.example"}"#, "not ASCII"),
        ] {
            let e = network(json).unwrap_err();
            assert!(e.contains(part), "{json}: {e}");
        }
    }

    #[test]
    fn masks_are_host_names() {
        for mask in ["localhost:${PORT}", "${PORT}-app.example.com", "app.example:8080"] {
            assert!(network(&format!(r#"{{"maskRequestHost": "{mask}"}}"#)).is_ok(), "{mask}");
        }
        assert!(network(r#"{"maskRequestHost": "http://x/"}"#).is_err());
    }

    #[test]
    fn secrets_are_not_shown_again() {
        let n = network(
            r#"{"egressProxy": {"address": "p.example:1080", "username": "u", "password": "hunter2",
                "tls": {"enabled": true, "caCert": "pem"}}, "httpsPorts": [3000], "dnsServers": []}"#,
        );
        let config = SandboxConfig { network: Some(n.unwrap()), ..SandboxConfig::default() };
        let shown = serde_json::to_value(of_config(&config)).unwrap();
        assert_eq!(
            shown,
            serde_json::json!({
                "allowPublicTraffic": true, "dnsServers": [], "httpsPorts": [3000],
                "egressProxy": {"address": "p.example:1080", "username": "u", "tls": {"enabled": true}},
            })
        );
    }
}
