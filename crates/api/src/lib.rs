//! The public REST API: what SDKs and the command line call.
//!
//! Teams, their keys and secrets, templates and paused sandboxes are kept in SQLite. Running ones are not: the nodes know
//! them, so that the API can end and start again without losing one.

mod admin;
mod auth;
mod auto_resume;
mod build;
mod checkpoint;
mod error;
mod expiry;
mod garbage;
mod input;
mod keys;
mod limit;
mod list;
mod master_key;
mod model;
mod network;
mod nodes;
mod observe;
mod openapi;
mod pause;
mod rate;
mod repeats;
mod sandboxes;
mod secrets;
mod server;
mod store;
mod tags;
mod template_builds;
mod templates;
mod volume_mounts;
mod volumes;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

pub use build::TemplateSpec;
pub use error::ApiError;
pub use garbage::{DEFAULT_GRACE, GarbageEntry, GarbageReport};
pub use master_key::{KeyError, MasterKey};
pub use nodes::{Nodes, VMM_LABEL};
pub use server::serve;
pub use store::{ApiKey, NewKey, Store, StoreError, TeamRow};
use tokio::sync::Notify;

/// Settings of the API.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Domain of sandboxes' host names, told to SDKs; none when they are told a URL.
    pub domain: Option<String>,
    /// Time of a sandbox whose creator does not say.
    pub default_timeout: Duration,
    /// Longest time that may be asked for.
    pub max_timeout: Duration,
    /// What nodes and all teams are managed with; none where nobody may.
    pub admin_token: Option<String>,
    /// Requests a second of a team, for a while twice as many; 0 is without a limit.
    pub request_rate: u32,
    /// Seals secrets, and signs the tokens of volumes.
    pub master_key: MasterKey,
}

impl ApiConfig {
    /// With this key, and the defaults for all else.
    pub fn new(master_key: MasterKey) -> Self {
        Self {
            domain: None,
            default_timeout: Duration::from_secs(300),
            max_timeout: Duration::from_secs(24 * 3600),
            admin_token: None,
            request_rate: 0,
            master_key,
        }
    }
}

/// The API over a store and nodes.
pub struct Api {
    pub(crate) config: ApiConfig,
    pub(crate) store: Store,
    pub(crate) nodes: Nodes,
    pub(crate) turns: pause::Turns,
    pub(crate) in_hand: checkpoint::InHand,
    pub(crate) rates: rate::Rates,
    pub(crate) starting: limit::Starting,
    pub(crate) repeats: repeats::Repeats,
    ready: AtomicBool,
    /// Told when a template has a new build.
    built: Notify,
}

impl Api {
    /// Not ready until [`Api::set_ready`] says so.
    pub fn new(config: ApiConfig, store: Store, nodes: Nodes) -> Arc<Self> {
        Arc::new(Self {
            rates: rate::Rates::new(config.request_rate),
            starting: Default::default(),
            repeats: Default::default(),
            config,
            store,
            nodes,
            turns: Default::default(),
            in_hand: Default::default(),
            ready: AtomicBool::new(false),
            built: Notify::new(),
        })
    }

    /// Whether sandboxes can be created, as far as the caller knows; `GET /health` also asks the
    /// node.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Relaxed);
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Relaxed)
    }
}
