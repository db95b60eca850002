//! What the daemon knows: settings from `POST /init`, running processes, watchers.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::filesystem::Watchers;
use crate::mounts::Mounts;
use crate::process::Processes;
use crate::system::System;

/// User of requests that name none, until `/init` says otherwise.
const FALLBACK_USER: &str = "root";

/// Settings that `POST /init` changes.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Token that requests must bring; none until one is set.
    pub token: Option<String>,
    /// Environment of every process.
    pub envs: HashMap<String, String>,
    /// User of requests that name none.
    pub user: String,
    /// Directory of processes and relative paths when none is named.
    pub workdir: Option<String>,
    /// Time and life cycle of the last `/init` that counted.
    pub initialised: Option<Initialised>,
}

/// What tells a stale `/init` from a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialised {
    /// Nanoseconds since 1970, by the host's clock.
    pub at: i64,
    /// The run of the sandbox.
    pub lifecycle: Option<String>,
}

/// Everything that requests share.
pub struct State {
    settings: Mutex<Settings>,
    /// What may be changed on this machine.
    pub system: System,
    /// Processes started here.
    pub processes: Processes,
    /// Watchers that collect events until asked.
    pub watchers: Watchers,
    /// Volumes that are mounted.
    pub mounts: Mounts,
    /// Processor time at the last look, for `/metrics`.
    pub cpu: crate::metrics::CpuClock,
}

impl State {
    /// Nothing set, nothing running.
    pub fn new(system: bool) -> Self {
        let envs = HashMap::from([("E2B_SANDBOX".to_owned(), "true".to_owned())]);
        Self {
            settings: Mutex::new(Settings {
                token: None,
                envs,
                user: FALLBACK_USER.to_owned(),
                workdir: None,
                initialised: None,
            }),
            system: System::new(system),
            processes: Processes::default(),
            watchers: Watchers::default(),
            mounts: Mounts::default(),
            cpu: crate::metrics::CpuClock::default(),
        }
    }

    /// Looks at or changes the settings; `f` must not block.
    pub fn settings<T>(&self, f: impl FnOnce(&mut Settings) -> T) -> T {
        f(&mut self.settings.lock())
    }

    /// The user that a request means when it names none.
    pub fn default_user(&self) -> String {
        self.settings(|s| s.user.clone())
    }

    /// The directory that a request means when it names none.
    pub fn default_workdir(&self) -> Option<String> {
        self.settings(|s| s.workdir.clone())
    }
}
