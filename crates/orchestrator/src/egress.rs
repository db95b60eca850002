//! A sandbox's egress policy, from the contract's messages.

use std::collections::HashMap;
use std::sync::Arc;

use nidus_egress::{EgressConfig, Gateway, Policy, PolicyError, ProxyTls, SocksProxy};
use nidus_hyperloop::{Hyperloop, Limits};
use nidus_proto::node::{SandboxConfig, SandboxNetworkEgressConfig};
use nidus_sandbox::NetworkSpec;
use nidus_telemetry::{GuestLogSink, LogOrigin, MemoryLogs};

/// What sandboxes' networks have in common on a node.
pub struct NetworkParts {
    /// Carries what policies want looked at.
    pub gateway: Arc<Gateway>,
    /// Where what guests log goes.
    pub logs: Arc<dyn GuestLogSink>,
    /// The newest of it, for those who ask.
    pub kept_logs: Arc<MemoryLogs>,
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
        let config = plain(egress.unwrap_or(&none), allow_internet);
        let policy = Policy::parse(&config, self.gateway.allowed_private())?;
        self.gateway.admit(&policy).await?;
        Ok(policy)
    }

    /// The network of a new sandbox.
    pub(crate) async fn of(&self, config: &SandboxConfig) -> Result<NetworkSpec, PolicyError> {
        let egress = config.network.as_ref().and_then(|n| n.egress.as_ref());
        let policy = self.policy(egress, config.allow_internet_access.unwrap_or(true)).await?;
        let origin = LogOrigin {
            sandbox_id: config.sandbox_id.clone(),
            team_id: config.team_id.clone(),
            template_id: config.template_id.clone(),
            execution_id: config.execution_id.clone(),
        };
        Ok(NetworkSpec { policy, hyperloop: Hyperloop::new(origin, self.logs.clone(), Limits::default()) })
    }
}
