//! The node, over gRPC.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use nidus_proto::node::garbage_service_client::GarbageServiceClient;
use nidus_proto::node::info_service_client::InfoServiceClient;
use nidus_proto::node::sandbox_service_client::SandboxServiceClient;
use nidus_proto::node::template_service_client::TemplateServiceClient;
use nidus_proto::node::volume_service_client::VolumeServiceClient;
use nidus_proto::node::{
    RunningSandbox, SandboxCreateRequest, SandboxCreateResponse, ServiceInfoResponse, ServiceInfoStatus,
    ServiceStatusChangeRequest,
};
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

use crate::ApiError;

/// The label by which a node says whose snapshots it can load: this and a `DriverId` as text.
pub const VMM_LABEL: &str = "vmm=";
/// Most bytes of an answer over HTTP, and the time for it.
const MAX_ANSWER: usize = 64 << 20;
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// What a node says of itself holds for this long.
const LABELS_KEPT: Duration = Duration::from_secs(5);

/// Connects to the node when it is first needed, and again when the connection is lost.
#[derive(Debug, Clone)]
pub struct Nodes {
    channel: Channel,
    /// Of the node's HTTP.
    url: String,
    client: Client<HttpConnector, Body>,
    said: Arc<Mutex<Option<Said>>>,
    created: Arc<Mutex<Created>>,
}

/// What has become of creations since this API was started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Created {
    pub done: u64,
    pub failed: u64,
    pub under_way: u64,
}

/// What the node said of itself.
#[derive(Debug, Clone)]
struct Said {
    at: Instant,
    /// Whose snapshots it loads.
    vmms: Vec<String>,
}

impl Nodes {
    /// The node that serves gRPC at this address.
    ///
    /// # Errors
    /// Never for a socket address; the type of the transport says otherwise.
    pub fn connect_lazy(address: SocketAddr) -> Result<Self, ApiError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| ApiError::bad(format!("'{address}' is not the address of a node: {e}")))?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let url = format!("http://{address}");
        let channel = endpoint.connect_lazy();
        Ok(Self { channel, url, client, said: Default::default(), created: Default::default() })
    }

    /// URL of the node's HTTP.
    pub(crate) fn http(&self) -> &str {
        &self.url
    }

    /// For the node's HTTP.
    pub(crate) fn client(&self) -> &Client<HttpConnector, Body> {
        &self.client
    }

    pub(crate) fn sandboxes(&self) -> SandboxServiceClient<Channel> {
        // A node's list of sandboxes may be long.
        SandboxServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn templates(&self) -> TemplateServiceClient<Channel> {
        TemplateServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn garbage(&self) -> GarbageServiceClient<Channel> {
        GarbageServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn volumes(&self) -> VolumeServiceClient<Channel> {
        // A directory of a volume may have many entries.
        VolumeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// What the node says of itself.
    pub(crate) async fn info(&self) -> Result<ServiceInfoResponse, ApiError> {
        Ok(InfoServiceClient::new(self.channel.clone()).service_info(()).await?.into_inner())
    }

    pub(crate) async fn set_status(&self, status: ServiceStatusChangeRequest) -> Result<(), ApiError> {
        InfoServiceClient::new(self.channel.clone()).service_status_override(status).await?;
        Ok(())
    }

    /// Has the node create or resume a sandbox, and counts what becomes of it.
    pub(crate) async fn create(
        &self,
        request: SandboxCreateRequest,
    ) -> Result<SandboxCreateResponse, ApiError> {
        /// Counts a creation whose client has gone, too.
        struct UnderWay<'a>(&'a Mutex<Created>);
        impl Drop for UnderWay<'_> {
            fn drop(&mut self) {
                self.0.lock().under_way -= 1;
            }
        }
        self.created.lock().under_way += 1;
        let _under_way = UnderWay(&self.created);
        let made = self.sandboxes().create(request).await;
        match made {
            Ok(made) => {
                self.created.lock().done += 1;
                Ok(made.into_inner())
            }
            Err(e) => {
                self.created.lock().failed += 1;
                Err(e.into())
            }
        }
    }

    pub(crate) fn created(&self) -> Created {
        *self.created.lock()
    }

    pub(crate) async fn is_healthy(&self) -> bool {
        let mut info = InfoServiceClient::new(self.channel.clone());
        let answer = tokio::time::timeout(Duration::from_secs(5), info.service_info(())).await;
        answer.is_ok_and(|a| a.is_ok_and(|a| a.get_ref().service_status == ServiceInfoStatus::Healthy as i32))
    }

    /// Refuses a build whose snapshot no node here can load.
    pub(crate) async fn check_runs(&self, vmm: &str) -> Result<(), ApiError> {
        let vmms = self.vmms().await?;
        // A node that says nothing is asked by trying.
        if vmms.is_empty() || vmm.is_empty() || vmms.iter().any(|v| v == vmm) {
            return Ok(());
        }
        Err(ApiError::new(
            http::StatusCode::CONFLICT,
            format!(
                "The template was built by {vmm}, and no node runs that (they run {}): build it again (nidus template build)",
                vmms.join(", ")
            ),
        ))
    }

    async fn vmms(&self) -> Result<Vec<String>, ApiError> {
        let said = self.said.lock().clone();
        if let Some(said) = said.filter(|s| s.at.elapsed() < LABELS_KEPT) {
            return Ok(said.vmms);
        }
        let info = self.info().await?;
        let vmms: Vec<String> =
            info.labels.iter().filter_map(|l| l.strip_prefix(VMM_LABEL)).map(str::to_owned).collect();
        *self.said.lock() = Some(Said { at: Instant::now(), vmms: vmms.clone() });
        Ok(vmms)
    }

    /// What the node's HTTP says at this path and query.
    pub(crate) async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let lost = |e: &dyn std::fmt::Display| {
            tracing::warn!("the node did not answer GET {path}: {e}");
            ApiError::new(http::StatusCode::SERVICE_UNAVAILABLE, "the node cannot be reached; try again")
        };
        let request = http::Request::get(format!("{}{path}", self.url)).body(Body::empty());
        let request = request.map_err(|e| ApiError::bad(e.to_string()))?;
        let answer = async {
            let answer = self.client.request(request).await.map_err(|e| lost(&e))?;
            let status = answer.status();
            let body = axum::body::to_bytes(Body::new(answer.into_body()), MAX_ANSWER).await;
            let body = body.map_err(|e| lost(&e))?;
            if status.is_success() {
                return serde_json::from_slice(&body).map_err(|e| lost(&e));
            }
            Err(ApiError::new(status, String::from_utf8_lossy(&body)))
        };
        tokio::time::timeout(ANSWER_LIMIT, answer).await.unwrap_or_else(|e| Err(lost(&e)))
    }

    pub(crate) async fn list(&self) -> Result<Vec<RunningSandbox>, ApiError> {
        Ok(self.sandboxes().list(()).await?.into_inner().sandboxes)
    }
}
