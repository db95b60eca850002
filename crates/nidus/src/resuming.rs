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
    fn known(&self, sandbox_id: &str) -> Option<Arc<Route>> {
        self.running.known(sandbox_id)
    }

    async fn find(&self, sandbox_id: &str) -> Option<Arc<Route>> {
        let resumed = self.api.resume_for_traffic(sandbox_id).await;
        resumed.then(|| self.running.known(sandbox_id)).flatten()
    }
}
