//! The proxy's catalog: what runs here, and what a request wakes.

use std::sync::Arc;

use async_trait::async_trait;
use nidus_api::Api;
use nidus_proxy::{Catalog, InProcessCatalog, Route};

/// Sandboxes of this machine. A paused one is resumed when its creator wants traffic to do that.
pub struct ResumingCatalog {
    /// Those that run.
    pub running: InProcessCatalog,
    /// Knows the paused ones.
    pub api: Arc<Api>,
}

#[async_trait]
impl Catalog for ResumingCatalog {
    async fn lookup(&self, sandbox_id: &str) -> Option<Route> {
        match self.running.lookup(sandbox_id).await {
            None if self.api.resume_for_traffic(sandbox_id).await => self.running.lookup(sandbox_id).await,
            found => found,
        }
    }
}
