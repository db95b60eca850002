//! Pause: a running sandbox becomes a build, and stops.

use std::time::Instant;

use crate::SaveError;
use crate::factory::Sandbox;
use crate::saving::{SaveSpec, Saved, publish, take};

impl Sandbox {
    /// Stops the guest and publishes its state as a build of its own. After that it is for the owner
    /// to [`kill`](Sandbox::kill); on an error it runs on (see [`SaveError::runs_on`]).
    pub async fn pause(&mut self, spec: &SaveSpec) -> Result<Saved, SaveError> {
        // Before the guest stands still: this fails early on a build that is there already.
        let staged = self.store().stage(spec.build_id).await?;
        let began = Instant::now();
        let taken = match take(self, &staged, None).await {
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
}
