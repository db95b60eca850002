//! Resume on traffic: a request for a paused sandbox wakes it, if its creator wanted that.

use std::sync::Arc;

use chrono::TimeDelta;
use nidus_proto::node::{SandboxAutoResumeConfig, SandboxConfig};

use crate::auth::Team;
use crate::pause::to_its_end;
use crate::store::SnapshotRow;
use crate::{Api, ApiError};

/// Any request resumes it.
const ANY: &str = "any";

/// How a new sandbox is set so that traffic resumes it; `seconds` is the time that it is created with.
pub fn policy(seconds: i64) -> SandboxAutoResumeConfig {
    SandboxAutoResumeConfig { policy: ANY.to_owned(), timeout_seconds: seconds.unsigned_abs() }
}

/// Whether traffic resumes it.
pub fn is_on(config: &SandboxConfig) -> bool {
    config.auto_resume.as_ref().is_some_and(|r| r.policy == ANY)
}

impl Api {
    /// Resumes a paused sandbox for which a request came; whether it runs then. Requests that come
    /// together resume it once. One whose creator did not ask for it stays paused.
    pub async fn resume_for_traffic(self: &Arc<Self>, id: &str) -> bool {
        match self.wake(id).await {
            Ok(runs) => runs,
            Err(e) => {
                tracing::warn!(sandbox = id, "could not be resumed for a request: {e}");
                false
            }
        }
    }

    async fn wake(self: &Arc<Self>, id: &str) -> Result<bool, ApiError> {
        // Nothing of what traffic would talk to is left of one without memory: it takes an explicit request.
        let wakes = |s: &SnapshotRow| is_on(&s.config) && !s.filesystem_only;
        let Some(known) = self.store.newest_snapshot(id).await?.filter(wakes) else {
            return Ok(false);
        };
        let (api, id) = (self.clone(), id.to_owned());
        to_its_end(async move {
            let _turn = api.turns.take(&id).await;
            let team = Team { id: known.config.team_id.clone(), name: String::new() };
            // Another request was first; or a pause that this one met has failed.
            if api.running(&team, &id).await?.is_some() {
                return Ok(true);
            }
            let asked = known.config.auto_resume.map_or(0, |r| r.timeout_seconds);
            let asked = TimeDelta::seconds(asked.try_into().unwrap_or_default());
            let length = asked.max(api.default_length());
            api.resume(&team, &id, length, None, false).await.map(|_| true)
        })
        .await
    }
}
