//! The node, over gRPC.

use std::net::SocketAddr;
use std::time::Duration;

use nidus_proto::node::info_service_client::InfoServiceClient;
use nidus_proto::node::sandbox_service_client::SandboxServiceClient;
use nidus_proto::node::template_service_client::TemplateServiceClient;
use nidus_proto::node::{RunningSandbox, ServiceInfoStatus};
use tonic::transport::{Channel, Endpoint};

use crate::ApiError;

/// Connects to the node when it is first needed, and again when the connection is lost.
#[derive(Debug, Clone)]
pub struct Nodes {
    channel: Channel,
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
        Ok(Self { channel: endpoint.connect_lazy() })
    }

    pub(crate) fn sandboxes(&self) -> SandboxServiceClient<Channel> {
        // A node's list of sandboxes may be long.
        SandboxServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn templates(&self) -> TemplateServiceClient<Channel> {
        TemplateServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) async fn is_healthy(&self) -> bool {
        let mut info = InfoServiceClient::new(self.channel.clone());
        let answer = tokio::time::timeout(Duration::from_secs(5), info.service_info(())).await;
        answer.is_ok_and(|a| a.is_ok_and(|a| a.get_ref().service_status == ServiceInfoStatus::Healthy as i32))
    }

    pub(crate) async fn list(&self) -> Result<Vec<RunningSandbox>, ApiError> {
        Ok(self.sandboxes().list(()).await?.into_inner().sandboxes)
    }
}
