//! The running process of a VM, whatever the driver: its steps, its end, its cgroup.

use std::time::Duration;

use crate::cgroup::Cgroup;
use crate::process::Process;
use crate::{Result, VmmError};

/// Why an exchange with a VMM failed.
pub(crate) enum StepError {
    /// The connection broke: the process is ending or gone.
    Lost(String),
    /// The VMM refused, or answered with something else than its protocol.
    Refused(String),
}

/// A process with its name and its cgroup.
#[derive(Debug)]
pub(crate) struct Running {
    pub name: String,
    pub process: Process,
    // Last: dropped, and so removed, after the process was killed.
    cgroup: Cgroup,
}

/// A connection closes just before the exit is known.
const EXIT_LIMIT: Duration = Duration::from_secs(2);

impl Running {
    pub fn new(name: String, process: Process, cgroup: Cgroup) -> Self {
        Self { name, process, cgroup }
    }

    /// Runs one exchange with the VMM, bounded in time and ended by the process's death.
    pub async fn step<T, E: Into<StepError>>(
        &self,
        action: &'static str,
        limit: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        match tokio::time::timeout(limit, work).await {
            Ok(Ok(v)) => Ok(v),
            Ok(Err(e)) => match e.into() {
                StepError::Refused(message) => Err(self.refused(action, message)),
                StepError::Lost(message) => {
                    let mut exit = self.process.exit();
                    match tokio::time::timeout(EXIT_LIMIT, exit.wait()).await {
                        Ok(status) => Err(self.exited(status, action)),
                        Err(_) => Err(self.refused(action, message)),
                    }
                }
            },
            Err(_) => {
                let seconds = limit.as_secs();
                Err(VmmError::Timeout { vm: self.name.clone(), action, seconds })
            }
        }
    }

    pub fn exited(&self, status: String, action: &'static str) -> VmmError {
        VmmError::Exited { vm: self.name.clone(), status, action, log: self.process.log() }
    }

    pub fn refused(&self, action: &str, message: String) -> VmmError {
        VmmError::Command { vm: self.name.clone(), command: action.into(), message }
    }

    /// Kills the process, waits for its end and removes its cgroup.
    pub async fn kill(self) -> Result<()> {
        let Self { process, cgroup, .. } = self;
        process.kill().await;
        // rmdir of a cgroup can wait for the kernel.
        tokio::task::spawn_blocking(move || drop(cgroup))
            .await
            .map_err(|e| VmmError::io("remove the cgroup", std::io::Error::other(e)))
    }
}
