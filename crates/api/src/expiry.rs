//! Sandboxes that are paused, not killed, when their time is over; and builds that nobody needs any more.
//!
//! The node keeps such a sandbox beyond its end for some minutes, for this task to pause it: what
//! is paused is the API's to know. Should the API be gone for longer, the node ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use nidus_proto::node::RunningSandbox;
use tokio_util::sync::CancellationToken;

use crate::auth::Team;
use crate::checkpoint::SWEEP;
use crate::sandboxes::time;
use crate::{Api, list};

/// Between two looks at the sandboxes' ends.
const LOOK: Duration = Duration::from_millis(500);

/// Pauses what is over until `stop`.
pub async fn run(api: Arc<Api>, stop: CancellationToken) {
    let mut swept = Instant::now();
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        // A node that cannot be asked is asked again.
        let Ok(all) = api.nodes.list().await else { continue };
        let due = all.iter().filter(|s| is_due(s)).map(|s| {
            let team = s.config.as_ref().map(|c| c.team_id.clone()).unwrap_or_default();
            let team = Team { id: team, name: String::new() };
            (team, list::id(s).to_owned())
        });
        let mut pauses = tokio::task::JoinSet::new();
        for (team, id) in due {
            let api = api.clone();
            pauses.spawn(async move {
                if let Err(e) = api.pause_when_due(&team, &id).await {
                    tracing::warn!(sandbox = id, "its time is over and it could not be paused: {e}");
                }
            });
        }
        // To the end, also when stopped: each is a sandbox half on its way.
        while pauses.join_next().await.is_some() {}
        if swept.elapsed() >= SWEEP {
            // Those that ran from a checkpoint may have ended by themselves.
            api.sweep().await;
            swept = Instant::now();
        }
    }
}

/// Whether it is to be paused now.
pub fn is_due(s: &RunningSandbox) -> bool {
    s.config.as_ref().is_some_and(|c| c.auto_pause) && time(s.end_time) <= Utc::now()
}

#[cfg(test)]
mod tests {
    use nidus_proto::node::SandboxConfig;

    use super::*;
    use crate::sandboxes::timestamp;

    #[test]
    fn only_those_that_asked_for_it_and_are_over() {
        let sandbox = |auto_pause, seconds| RunningSandbox {
            config: Some(SandboxConfig { auto_pause, ..Default::default() }),
            end_time: Some(timestamp(Utc::now() + chrono::TimeDelta::seconds(seconds))),
            ..Default::default()
        };
        assert!(is_due(&sandbox(true, -1)));
        assert!(!is_due(&sandbox(true, 60)));
        assert!(!is_due(&sandbox(false, -1)));
        assert!(!is_due(&RunningSandbox::default()));
    }
}
