//! Checkpoint: a running sandbox becomes a build, and runs on.

use std::time::Duration;

use crate::SaveError;
use crate::factory::Sandbox;
use crate::saving::{SaveSpec, Saved, publish, take};

impl Sandbox {
    /// Publishes the state of now as a build of its own, which others can be resumed from. The guest
    /// stands still for as long as it takes to copy the memory that it wrote. It runs on also on an
    /// error (see [`SaveError::runs_on`]), and then nothing was published.
    pub async fn checkpoint(&mut self, spec: &SaveSpec) -> Result<Saved, SaveError> {
        let staged = self.store().stage(spec.build_id).await?;
        self.sync_guest(spec).await?;
        let copies = self.copies();
        let taken = match take(self, spec, &staged, Some(copies)).await {
            Ok(taken) => taken,
            Err(e) => return self.resume_after(Err(e)).await,
        };
        let (disk, runs, stopped) = (taken.disk.clone(), taken.lets_guest_run(), taken.stopped);
        let mut stop_time = Duration::ZERO;
        if runs {
            self.resume_after(Ok(())).await?;
            stop_time = stopped.elapsed();
        }
        let mut saved = publish(self, spec, staged, taken).await;
        if !runs {
            saved = self.resume_after(saved).await;
            stop_time = stopped.elapsed();
        }
        self.settle(disk).await;
        saved.map(|saved| Saved { stop_time, ..saved })
    }
}
