//! Which sandboxes there are, and where.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

/// Way to one run of a sandbox.
#[derive(Debug, Clone)]
pub struct Route {
    /// Address of its guest, any port.
    pub host_ip: Ipv4Addr,
    /// When set, requests to any port but envd's need it in `E2b-Traffic-Access-Token`.
    pub traffic_access_token: Option<String>,
    /// When set, the `Host` that the guest sees; `${PORT}` stands for the port.
    pub mask_request_host: Option<String>,
    /// Ports that speak TLS. Who is there is known by the address, so their certificates are not verified.
    pub https_ports: Vec<u16>,
    /// Cancelled when this run ends: every connection to it is closed then.
    pub gone: CancellationToken,
}

/// Finds sandboxes.
#[async_trait]
pub trait Catalog: Send + Sync + 'static {
    /// The route to a running sandbox, if that is known at once.
    fn known(&self, sandbox_id: &str) -> Option<Arc<Route>>;

    /// The route to a sandbox that is not known, which may have to be woken or asked for.
    async fn find(&self, sandbox_id: &str) -> Option<Arc<Route>>;
}

/// The catalog of a single machine.
#[derive(Debug, Clone, Default)]
pub struct InProcessCatalog {
    routes: Arc<RwLock<HashMap<String, Arc<Route>>>>,
}

impl InProcessCatalog {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sandbox that runs.
    pub fn insert(&self, sandbox_id: String, route: Route) {
        self.routes.write().insert(sandbox_id, Arc::new(route));
    }

    /// Takes one out that ends.
    pub fn remove(&self, sandbox_id: &str) -> Option<Arc<Route>> {
        self.routes.write().remove(sandbox_id)
    }
}

#[async_trait]
impl Catalog for InProcessCatalog {
    fn known(&self, sandbox_id: &str) -> Option<Arc<Route>> {
        self.routes.read().get(sandbox_id).cloned()
    }

    async fn find(&self, _: &str) -> Option<Arc<Route>> {
        None
    }
}
