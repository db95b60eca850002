//! A sandbox's way to the network: what the kernel lets through, and the gateway for the rest.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use nidus_egress::{Gateway, Policy, Services, SlotGateway};
use nidus_envd_protocol::{ENVD_PORT, EnvdClient, EnvdError, InitRequest, VolumeMount};
use nidus_hyperloop::Hyperloop;
use nidus_network::{HYPERLOOP_IP, NetworkError, NetworkSlot};
use tokio_util::sync::CancellationToken;

use crate::{CreateError, Sandbox};

/// How long envd may take to trust another certificate.
const TRUST_LIMIT: Duration = Duration::from_secs(10);

/// Where programs in the guest that do not ask the system find the certificates that it trusts.
const TRUST_VARIABLES: &[&str] =
    &["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"];
const TRUST_FILE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What a sandbox may reach, and what it finds at hyperloop's address.
#[derive(Clone)]
pub struct NetworkSpec {
    /// What it may reach.
    pub policy: Policy,
    /// The service that knows it by its listener.
    pub hyperloop: Arc<Hyperloop>,
    /// The volumes that it may mount.
    pub volumes: Arc<nidus_nfs::Server>,
    /// Which of them (by the export's name) its envd mounts, and where.
    pub mounts: Vec<(String, String)>,
}

impl std::fmt::Debug for NetworkSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetworkSpec").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Why the policy of a running sandbox could not be replaced. What was in force before may be so in part.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The kernel's rules.
    #[error("cannot change the network of the sandbox: {0}")]
    Network(#[from] NetworkError),
    /// The guest does not trust the certificates by which headers are set in its requests.
    #[error("the guest did not take the certificate that the rules need: {0}")]
    Trust(#[from] EnvdError),
}

/// Puts a slot under a policy and serves its gateway. Before anything of the sandbox runs.
pub(crate) async fn guard(
    gateway: &Arc<Gateway>,
    slot: &NetworkSlot,
    spec: &NetworkSpec,
) -> Result<SlotGateway, CreateError> {
    slot.set_egress(&spec.policy.kernel_rules()).await?;
    let sockets = slot.gateway_sockets()?;
    let (service, volumes) = (spec.hyperloop.clone(), spec.volumes.clone());
    let services = move |listeners: Services, stop: CancellationToken| async move {
        let hyperloop = nidus_hyperloop::serve(listeners.hyperloop, service, stop.clone());
        let volumes = nidus_nfs::serve(listeners.volumes, volumes, stop);
        if let (Err(e), ()) = tokio::join!(hyperloop, volumes) {
            tracing::warn!("hyperloop of a sandbox ended: {e}");
        }
    };
    gateway
        .serve(sockets, spec.policy.clone(), services)
        .map_err(|e| CreateError::io("serve a sandbox's gateway", e))
}

/// What programs in the guest are told that do not ask the system whom to trust.
pub(crate) fn trust(env: &mut HashMap<String, String>) {
    for name in TRUST_VARIABLES {
        env.entry((*name).to_owned()).or_insert_with(|| TRUST_FILE.to_owned());
    }
}

impl Sandbox {
    /// Tells envd of hyperloop, and whom to trust.
    pub(crate) fn introduce(&self, request: &mut InitRequest) {
        request.hyperloop_ip = Some(HYPERLOOP_IP.to_string());
        request.ca_bundle = self.trusts_ca.then(|| self.node_gateway().ca_pem().to_owned());
    }

    /// What its envd is to mount: these and no others, if its memory has others mounted.
    pub(crate) fn volume_mounts(&self) -> Vec<VolumeMount> {
        let mounts = self.spec.network.mounts.iter();
        mounts
            .map(|(export, path)| VolumeMount {
                nfs_target: format!("{HYPERLOOP_IP}:{export}"),
                path: path.clone(),
            })
            .collect()
    }

    /// Replaces its egress policy. Flows that the new one allows go on, others are cut.
    ///
    /// # Errors
    /// When the kernel refuses the rules, or the guest a certificate that the policy needs.
    pub async fn update_egress(&mut self, policy: Policy) -> Result<(), UpdateError> {
        if policy.needs_ca() && !self.trusts_ca {
            self.trusts_ca = true;
            let told = self.tell_trust().await;
            self.trusts_ca = told.is_ok();
            told?;
        }
        let mut rules = policy.kernel_rules();
        rules.kept = self.gateway.addresses_of(&policy).await;
        // The gateway knows the new policy before the kernel sends it what that wants looked at.
        self.gateway.update(policy.clone());
        self.spec.network.policy = policy;
        Ok(self.slot().set_egress(&rules).await?)
    }

    async fn tell_trust(&self) -> Result<(), EnvdError> {
        let mut request = InitRequest {
            env_vars: Some(self.environment()),
            access_token: self.spec.access_token.clone(),
            timestamp: Some(Utc::now()),
            lifecycle_id: Some(self.spec.execution_id.clone()),
            ..InitRequest::default()
        };
        self.introduce(&mut request);
        let envd = SocketAddr::from((self.host_ip(), ENVD_PORT));
        EnvdClient::new(envd, self.spec.access_token.clone()).init(&request, TRUST_LIMIT).await
    }
}
