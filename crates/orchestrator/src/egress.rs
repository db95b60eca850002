//! A sandbox's egress policy, from the contract's messages.

use std::collections::HashMap;
use std::sync::Arc;

use nidus_egress::{EgressConfig, Gateway, Policy, PolicyError, ProxyTls, SocksProxy};
use nidus_hyperloop::{Hyperloop, Limits};
use nidus_proto::node::{SandboxConfig, SandboxNetworkEgressConfig};
use nidus_sandbox::NetworkSpec;
use nidus_telemetry::{GuestLogSink, LogOrigin, MemoryLogs};
use tonic::Status;

use crate::mounts::Exports;

/// What sandboxes' networks have in common on a node.
pub struct NetworkParts {
    /// Carries what policies want looked at.
    pub gateway: Arc<Gateway>,
    /// The volumes that guests may mount.
    pub exports: Exports,
    /// Where what guests log goes.
    pub logs: Arc<dyn GuestLogSink>,
    /// The newest of it, for those who ask.
    pub kept_logs: Arc<MemoryLogs>,
}

/// A header's value with the secrets in their place.
fn filled(value: &str, secrets: &HashMap<String, String>) -> Result<String, PolicyError> {
    const FRONT: &str = "${e2b.secrets.";
    let mut parts = value.split(FRONT);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let known = part.split_once('}').and_then(|(name, rest)| Some((secrets.get(name)?, rest)));
        let (secret, rest) = known.ok_or(PolicyError::Secret)?;
        out.push_str(secret);
        out.push_str(rest);
    }
    Ok(out)
}

/// The rules that a policy is made of: the ones asked for, with their secrets in place.
fn with_secrets(egress: &SandboxNetworkEgressConfig) -> Result<SandboxNetworkEgressConfig, PolicyError> {
    let mut egress = egress.clone();
    let secrets = std::mem::take(&mut egress.secrets);
    let rules = egress.rules.values_mut().flat_map(|r| &mut r.rules);
    for value in rules.filter_map(|r| r.transform.as_mut()).flat_map(|t| t.headers.values_mut()) {
        *value = filled(value, &secrets)?;
    }
    Ok(egress)
}

fn plain(egress: &SandboxNetworkEgressConfig, allow_internet: bool) -> EgressConfig {
    let e = egress.clone();
    let headers = |rules: nidus_proto::node::SandboxNetworkDomainRules| {
        let transforms = rules.rules.into_iter().filter_map(|rule| rule.transform);
        transforms.map(|t| t.headers).collect::<Vec<HashMap<_, _>>>()
    };
    let proxy = (!e.egress_proxy_address.is_empty()).then_some(SocksProxy {
        address: e.egress_proxy_address,
        username: e.egress_proxy_username,
        password: e.egress_proxy_password,
        tls: e.egress_proxy_tls.map(|t| ProxyTls { server_name: t.server_name, ca_cert: t.ca_cert }),
    });
    EgressConfig {
        allow_internet,
        allowed_cidrs: e.allowed_cidrs,
        denied_cidrs: e.denied_cidrs,
        allowed_domains: e.allowed_domains,
        rules: e.rules.into_iter().map(|(domain, rules)| (domain, headers(rules))).collect(),
        proxy,
        dns_servers: e.dns_servers.map(|s| s.addresses),
    }
}

impl NetworkParts {
    /// Checks a policy, and that what it needs outside of the node is there.
    pub(crate) async fn policy(
        &self,
        egress: Option<&SandboxNetworkEgressConfig>,
        allow_internet: bool,
    ) -> Result<Policy, PolicyError> {
        let none = SandboxNetworkEgressConfig::default();
        let config = plain(&with_secrets(egress.unwrap_or(&none))?, allow_internet);
        let policy = Policy::parse(&config, self.gateway.allowed_private())?;
        self.gateway.admit(&policy).await?;
        Ok(policy)
    }

    /// The network of a new sandbox, with the volumes that it finds there.
    pub(crate) async fn of(&self, config: &SandboxConfig) -> Result<NetworkSpec, Status> {
        let egress = config.network.as_ref().and_then(|n| n.egress.as_ref());
        let policy = self.policy(egress, config.allow_internet_access.unwrap_or(true)).await;
        let policy = policy.map_err(|e| Status::invalid_argument(e.to_string()))?;
        let origin = LogOrigin {
            sandbox_id: config.sandbox_id.clone(),
            team_id: config.team_id.clone(),
            template_id: config.template_id.clone(),
            execution_id: config.execution_id.clone(),
        };
        let hyperloop = Hyperloop::new(origin, self.logs.clone(), Limits::default());
        let (exports, wanted) = (self.exports.clone(), config.volume_mounts.clone());
        let mounted = match wanted.is_empty() {
            true => exports.of(&[])?,
            // It looks at files.
            false => tokio::task::spawn_blocking(move || exports.of(&wanted))
                .await
                .map_err(|e| Status::internal(format!("the look at volumes broke off: {e}")))??,
        };
        Ok(NetworkSpec { policy, hyperloop, volumes: mounted.server, mounts: mounted.mounts })
    }
}

#[cfg(test)]
mod tests {
    use nidus_proto::node::{SandboxNetworkDomainRules, SandboxNetworkRule, SandboxNetworkTransform};

    use super::*;

    #[test]
    fn secrets_are_put_in_place_and_missing_ones_refused() {
        let secrets = HashMap::from([
            ("a".to_owned(), "1".to_owned()),
            ("b".to_owned(), "${e2b.secrets.a}".to_owned()),
        ]);
        assert_eq!(filled("Bearer ${e2b.secrets.a}!", &secrets).unwrap(), "Bearer 1!");
        assert_eq!(filled("plain", &secrets).unwrap(), "plain");
        // A value is not looked at again.
        assert_eq!(filled("${e2b.secrets.b}", &secrets).unwrap(), "${e2b.secrets.a}");
        for bad in ["${e2b.secrets.c}", "${e2b.secrets.a"] {
            assert!(matches!(filled(bad, &secrets), Err(PolicyError::Secret)));
        }
        let headers = HashMap::from([("x".to_owned(), "${e2b.secrets.a}".to_owned())]);
        let rule = SandboxNetworkRule { transform: Some(SandboxNetworkTransform { headers }) };
        let rules = HashMap::from([("h".to_owned(), SandboxNetworkDomainRules { rules: vec![rule] })]);
        let asked = SandboxNetworkEgressConfig { rules, secrets, ..Default::default() };
        let used = with_secrets(&asked).unwrap();
        assert_eq!(used.rules["h"].rules[0].transform.as_ref().unwrap().headers["x"], "1");
        assert!(used.secrets.is_empty());
    }
}
