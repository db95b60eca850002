//! Pause: a running sandbox becomes a build, and stops.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nidus_envd_protocol::{Client, ENVD_PORT, EnvdClient, StartCommand};

use crate::SaveError;
use crate::factory::Sandbox;
use crate::saving::{SaveSpec, Saved, publish, take};

/// Longest wait for a guest's answer, before it is asked to do anything.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a guest that writes its cached files to its disk.
const SYNC_LIMIT: Duration = Duration::from_secs(60);

impl Sandbox {
    /// Stops the guest and publishes its state, or its disk alone, as a build of its own. After that it
    /// is for the owner to [`kill`](Sandbox::kill); on an error it runs on (see [`SaveError::runs_on`]).
    pub async fn pause(&mut self, spec: &SaveSpec) -> Result<Saved, SaveError> {
        // Before the guest stands still: this fails early on a build that is there already.
        let staged = self.store().stage(spec.build_id).await?;
        self.sync_guest(spec).await?;
        let began = Instant::now();
        let taken = match take(self, spec, &staged, None).await {
            Ok(taken) => taken,
            Err(e) => return self.resume_after(Err(e)).await,
        };
        let disk = taken.disk.clone();
        match publish(self, spec, staged, taken).await {
            Ok(saved) => Ok(Saved { stop_time: began.elapsed(), ..saved }),
            Err(e) => {
                let failed = self.resume_after(Err(e)).await;
                self.settle(disk).await;
                failed
            }
        }
    }

    /// Has the guest write what it has cached of its disk, if that is all that will be left of it.
    pub(crate) async fn sync_guest(&self, spec: &SaveSpec) -> Result<(), SaveError> {
        if !spec.filesystem_only {
            return Ok(());
        }
        let envd = SocketAddr::from((self.host_ip(), ENVD_PORT));
        EnvdClient::new(envd, None).health(ANSWER_LIMIT).await.map_err(|e| SaveError::Sync(e.to_string()))?;
        let client = Client::direct(envd);
        let client = match self.guest_state().access_token {
            Some(token) => client.access_token(&token),
            None => Ok(client),
        };
        let client = client.map_err(|e| SaveError::Sync(e.to_string()))?;
        let run = client.run(StartCommand::new("sync").user("root"));
        match tokio::time::timeout(SYNC_LIMIT, run).await {
            Ok(Ok(out)) if out.exit_code == 0 => Ok(()),
            Ok(Ok(out)) => {
                let text: String = String::from_utf8_lossy(&out.stderr).chars().take(200).collect();
                Err(SaveError::Sync(format!("sync ended with {}: {text}", out.status)))
            }
            Ok(Err(e)) => Err(SaveError::Sync(e.to_string())),
            Err(_) => Err(SaveError::Sync(format!("sync took more than {} s", SYNC_LIMIT.as_secs()))),
        }
    }
}
