//! The node: its parts, its sandboxes, its status.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use nidus_build::Pipeline;
use nidus_egress::Policy;
use nidus_proto::node::{SandboxConfig, SandboxNetworkEgressConfig, ServiceInfoStatus};
use nidus_proxy::InProcessCatalog;
use nidus_sandbox::{Factory, SaveError, SaveSpec, Saved, UpdateError};
use nidus_telemetry::Sink;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::builds::Builds;
use crate::egress::NetworkParts;
use crate::info::CpuMeter;
use crate::metrics::Metrics;

/// Settings of a node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Id of this node, kept over restarts.
    pub node_id: String,
    /// Labels that placement may ask for.
    pub labels: Vec<String>,
    /// Sandboxes at once, starting ones included.
    pub max_sandboxes: usize,
    /// Sandboxes that may start at the same instant; more wait for their turn.
    pub max_starting: usize,
    /// Longest wait for that turn.
    pub start_limit: Duration,
    /// Root disk of a template that does not say, in MiB.
    pub default_disk_mb: u32,
    /// Templates get memory in pages of 2 MiB also where they do not ask for it.
    pub huge_pages: bool,
    /// Images of root file systems by the name under which templates may ask for them, before any other
    /// place is looked at. Users name them; only the host's owner says what they are.
    pub local_images: BTreeMap<String, PathBuf>,
    /// Where clients of the node find its HTTP, without a slash at the end.
    pub url: String,
    /// Template builds at once.
    pub max_builds: usize,
    /// What layers of template builds may take on the disk together, in bytes.
    pub layer_cache_bytes: u64,
    /// Time between two looks at the figures of each sandbox; zero is never.
    pub metrics_every: Duration,
    /// Version of the program.
    pub version: String,
    /// Directory whose file system is reported as the node's disk.
    pub data_dir: PathBuf,
}

/// A machine that runs sandboxes and builds templates.
pub struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) factory: Arc<Factory>,
    pub(crate) builds: Builds,
    pub(crate) catalog: InProcessCatalog,
    pub(crate) events: Arc<dyn Sink>,
    pub(crate) network: NetworkParts,
    pub(crate) sandboxes: Mutex<HashMap<String, Arc<Entry>>>,
    pub(crate) starting: Semaphore,
    pub(crate) starting_count: AtomicUsize,
    pub(crate) service_id: Uuid,
    pub(crate) started_at: DateTime<Utc>,
    pub(crate) status_changed_at: Mutex<DateTime<Utc>>,
    pub(crate) create_successes: AtomicU64,
    pub(crate) create_fails: AtomicU64,
    pub(crate) cpu: CpuMeter,
    pub(crate) metrics: Metrics,
    status: AtomicI32,
    closing: AtomicBool,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It does not answer yet.
    Starting,
    /// It answers, is listed and routed to.
    Running,
    /// Like running, while it is stored; its guest stands still for a moment.
    Checkpointing,
    /// It stands still while it is stored; then it is gone, or runs on.
    Pausing,
    /// It is being released.
    Ending,
    /// It is being released, or was, after it had been stored.
    Paused,
}

/// What becomes of a sandbox after it was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// A pause.
    End,
    /// A checkpoint.
    RunOn,
}

/// A pause or a checkpoint, from the service to the sandbox's owner.
pub(crate) struct SaveRequest {
    pub spec: SaveSpec,
    pub then: Then,
    /// Dropped without an answer when the sandbox ended before.
    pub done: oneshot::Sender<Result<Saved, SaveError>>,
}

/// A change of a sandbox's network, from the service to its owner.
pub(crate) struct EgressRequest {
    pub policy: Policy,
    /// What it was made of, to be shown.
    pub config: Box<SandboxNetworkEgressConfig>,
    /// Dropped without an answer when the sandbox ended before.
    pub done: oneshot::Sender<Result<(), UpdateError>>,
}

/// A sandbox in the node's map: what others may know of it and ask of it.
pub(crate) struct Entry {
    pub config: SandboxConfig,
    pub start: DateTime<Utc>,
    pub end: watch::Sender<DateTime<Utc>>,
    /// Asks its owner to end it.
    pub kill: CancellationToken,
    /// Why, when it was asked to.
    pub reason: Mutex<Option<String>>,
    /// Where it is in its life.
    pub state: Mutex<State>,
    /// Takes one pause or checkpoint to its owner.
    pub saves: mpsc::Sender<SaveRequest>,
    /// Takes one change of its network to its owner.
    pub updates: mpsc::Sender<EgressRequest>,
    /// Address of its guest, once it answers.
    pub host_ip: OnceLock<Ipv4Addr>,
    /// What replaced the egress part of its configuration.
    pub egress: Mutex<Option<SandboxNetworkEgressConfig>>,
    /// Set by its owner when everything of it is released.
    pub released: watch::Sender<bool>,
}

impl Entry {
    /// Waits until everything of this sandbox is released.
    pub async fn gone(&self) {
        let mut released = self.released.subscribe();
        // The sender lives as long as `self`, so this cannot fail.
        let _ = released.wait_for(|r| *r).await;
    }

    /// Its configuration as it is now.
    pub fn current_config(&self) -> SandboxConfig {
        let mut config = self.config.clone();
        if let Some(egress) = self.egress.lock().clone() {
            config.network.get_or_insert_default().egress = Some(egress);
            // What it said is in there.
            config.allow_internet_access = None;
        }
        config
    }

    /// Whether it is to be listed.
    pub fn is_running(&self) -> bool {
        matches!(*self.state.lock(), State::Running | State::Checkpointing) && !self.kill.is_cancelled()
    }

    /// From running to pausing or checkpointing; one at a time. The state that it is in when that
    /// cannot be.
    pub fn begin_save(&self, then: Then) -> Result<(), State> {
        let mut state = self.state.lock();
        match *state {
            State::Running if self.kill.is_cancelled() => Err(State::Ending),
            State::Running => {
                *state = match then {
                    Then::End => State::Pausing,
                    Then::RunOn => State::Checkpointing,
                };
                Ok(())
            }
            other => Err(other),
        }
    }

    pub fn ask_to_end(&self, reason: &str) {
        self.reason.lock().get_or_insert_with(|| reason.to_owned());
        self.kill.cancel();
    }
}

impl Node {
    /// A node over its parts.
    pub fn new(
        config: NodeConfig,
        factory: Arc<Factory>,
        pipeline: Arc<Pipeline>,
        catalog: InProcessCatalog,
        events: Arc<dyn Sink>,
        network: NetworkParts,
    ) -> Arc<Self> {
        Arc::new(Self {
            starting: Semaphore::new(config.max_starting.max(1)),
            starting_count: AtomicUsize::new(0),
            builds: Builds::new(
                pipeline,
                factory.store().clone(),
                config.max_builds,
                config.layer_cache_bytes,
            ),
            config,
            factory,
            catalog,
            events,
            network,
            sandboxes: Default::default(),
            service_id: Uuid::new_v4(),
            started_at: Utc::now(),
            status_changed_at: Mutex::new(Utc::now()),
            create_successes: AtomicU64::new(0),
            create_fails: AtomicU64::new(0),
            cpu: CpuMeter::default(),
            metrics: Metrics::default(),
            status: AtomicI32::new(ServiceInfoStatus::Healthy as i32),
            closing: AtomicBool::new(false),
        })
    }

    /// Whether it takes new sandboxes.
    pub fn status(&self) -> ServiceInfoStatus {
        if self.closing.load(Relaxed) {
            return ServiceInfoStatus::Draining;
        }
        ServiceInfoStatus::try_from(self.status.load(Relaxed)).unwrap_or(ServiceInfoStatus::Unhealthy)
    }

    /// Sets that from outside (InfoService.ServiceStatusOverride).
    pub fn set_status(&self, status: ServiceInfoStatus) {
        if self.status.swap(status as i32, Relaxed) != status as i32 {
            *self.status_changed_at.lock() = Utc::now();
        }
    }

    /// How many sandboxes there are, starting and ending ones included.
    pub fn sandbox_count(&self) -> usize {
        self.sandboxes.lock().len()
    }

    /// Takes no more work, ends all sandboxes and builds, and waits until they are released.
    pub async fn shutdown(&self) {
        self.closing.store(true, Relaxed);
        let all: Vec<Arc<Entry>> = self.sandboxes.lock().values().cloned().collect();
        for entry in &all {
            entry.ask_to_end("the node is shutting down");
        }
        self.builds.shutdown().await;
        for entry in &all {
            entry.gone().await;
        }
    }
}
