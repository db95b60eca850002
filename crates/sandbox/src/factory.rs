//! The factory: opens templates, keeps warm machines, creates sandboxes.

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use nidus_egress::{Gateway, SlotGateway};
use nidus_envd_protocol::{Client, ENVD_PORT, EnvdClient, InitRequest};
use nidus_memfs::MemFs;
use nidus_network::NetworkSlot;
use nidus_storage::{BuildId, Builds};
use nidus_template::{Builder, GuestState, READY_LIMIT, TemplateMetadata, VmHost};
use nidus_vmm::MemoryDoor;
use parking_lot::Mutex;
use tokio::sync::{Notify, RwLock, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cached::Cached;
use crate::compaction::Compactor;
use crate::guarded::{self, NetworkSpec};
use crate::lineage::{Lineages, Use};
use crate::machine::{Machine, Parts};
use crate::opened::Opened;
use crate::rehearsal::{first_words, rehearse};
use crate::saving::COPY_LIMIT_MB;
use crate::served::MemoryError;
use crate::template::Start;
use crate::warm::{WarmSet, WarmStats};
use crate::{CreateError, KillError, OpenTemplate};

/// They wait for the disk together; what they serve is in the page cache afterwards.
const MEMFS_THREADS: usize = 4;

/// Settings of a factory.
#[derive(Debug, Clone)]
pub struct FactoryConfig {
    /// Directory of overlay files; emptied when the factory starts.
    pub overlays: PathBuf,
    /// Machines kept warm for each template in use; 0 turns it off.
    pub warm: usize,
    /// Whether they run their template's ready command before they are used.
    pub rehearse: bool,
    /// Longest time from letting a guest run to envd's answer.
    pub envd_limit: Duration,
    /// How long a template stays open after its last use; not 0.
    pub template_ttl: Duration,
}

/// What a sandbox is to be.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// Its id.
    pub sandbox_id: String,
    /// Id of this run of it.
    pub execution_id: String,
    /// Template that it is made from.
    pub template_id: String,
    /// Build of it to resume.
    pub build_id: BuildId,
    /// Environment of every command.
    pub env_vars: HashMap<String, String>,
    /// Token that envd asks for.
    pub access_token: Option<String>,
    /// What it may reach.
    pub network: NetworkSpec,
    /// Whether the build is a paused sandbox, which is resumed once, rather than a template.
    pub snapshot: bool,
    /// Whether its disk is booted even if the build has a memory, which is left out then.
    pub filesystem_boot: bool,
    /// Sizes that are not the build's own: its disk is booted with them.
    pub size: Option<MachineSize>,
}

/// Sizes of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSize {
    /// Virtual processors.
    pub vcpu: u32,
    /// MiB of memory.
    pub memory_mb: u32,
    /// MiB of the root disk, not less than it has.
    pub disk_mb: u32,
}

/// Makes sandboxes on this node.
pub struct Factory {
    inner: Arc<Inner>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    config: FactoryConfig,
    store: Arc<Builds>,
    host: Arc<VmHost>,
    builder: Arc<Builder>,
    gateway: Arc<Gateway>,
    /// Where VMMs that map their memory find it.
    memfs: Option<Arc<MemFs>>,
    templates: Cached,
    opened: Arc<Opened>,
    /// Builds that were just published, for compaction.
    paused: mpsc::UnboundedSender<BuildId>,
    warm: WarmSet,
    /// Which builds are in use and which read which.
    lineages: Arc<Lineages>,
    /// What may still be copied of memories, in MiB.
    copies: Arc<Semaphore>,
    wake: Notify,
    stop: CancellationToken,
}

impl Factory {
    /// A factory over this node's parts; `builder` has what a disk alone is booted with,
    /// `gateway` carries what sandboxes' policies want looked at. Overlay files of
    /// an earlier, killed daemon are removed.
    ///
    /// # Errors
    /// When the overlay directory cannot be made or emptied.
    pub fn start(
        config: FactoryConfig,
        store: Arc<Builds>,
        host: Arc<VmHost>,
        builder: Arc<Builder>,
        gateway: Arc<Gateway>,
    ) -> Result<Self, CreateError> {
        let dir = &config.overlays;
        std::fs::create_dir_all(dir).map_err(|e| CreateError::io(format!("make {}", dir.display()), e))?;
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            std::fs::remove_file(entry.path())
                .map_err(|e| CreateError::io(format!("remove {}", entry.path().display()), e))?;
        }
        let memfs = match host.vmm.needs().memory {
            MemoryDoor::Memfile => Some(Arc::new(MemFs::start(MEMFS_THREADS).map_err(MemoryError::File)?)),
            MemoryDoor::Own => None,
        };
        let (paused, to_compact) = mpsc::unbounded_channel();
        let inner = Arc::new(Inner {
            templates: Cached::new(config.template_ttl),
            lineages: Arc::new(Lineages::new(store.clone())),
            config,
            store,
            host,
            builder,
            gateway,
            memfs,
            opened: Arc::default(),
            paused,
            warm: WarmSet::default(),
            copies: Arc::new(Semaphore::new(COPY_LIMIT_MB)),
            wake: Notify::new(),
            stop: CancellationToken::new(),
        });
        let compactor = Compactor {
            store: inner.store.clone(),
            opened: inner.opened.clone(),
            lineages: inner.lineages.clone(),
            stop: inner.stop.clone(),
        };
        let tasks = vec![
            tokio::spawn(refill(inner.clone())),
            tokio::spawn(compactor.run(to_compact)),
            tokio::spawn(close_unused(inner.clone())),
        ];
        Ok(Self { inner, tasks: Mutex::new(tasks) })
    }

    /// Resumes a template as a new sandbox, or boots it. Returns when envd has answered; `cancel` ends
    /// it early, and then, as on every error, nothing of it is left.
    pub async fn create(&self, spec: SandboxSpec, cancel: CancellationToken) -> Result<Sandbox, CreateError> {
        let inner = self.inner.clone();
        // A task of its own: a caller that goes away must not leave a machine half made.
        let task = tokio::spawn(async move { inner.create(spec, cancel).await });
        task.await.map_err(|e| CreateError::io("finish a sandbox's creation", std::io::Error::other(e)))?
    }

    /// Keeps machines of this build warm from now on.
    pub async fn prewarm(&self, build: BuildId) {
        self.inner.want(build).await;
    }

    /// Machines of this build that stand ready.
    pub fn warm_count(&self, build: BuildId) -> usize {
        self.inner.warm.count(build)
    }

    /// Forgets a build that was deleted.
    pub async fn forget(&self, build: BuildId) {
        self.inner.templates.forget(build);
        self.inner.destroy_all(self.inner.warm.forget(build)).await;
    }

    /// Which builds are in use and which read which.
    pub fn lineages(&self) -> &Lineages {
        &self.inner.lineages
    }

    /// Keeps these templates open for good, and no other ones any more. Opens those that are not: what
    /// the disk cache has of them is kept from then on.
    pub async fn pin(&self, builds: HashSet<BuildId>) {
        self.inner.templates.pin(builds.clone());
        for build in builds {
            if let Err(e) = self.inner.template(build).await {
                tracing::warn!(%build, "a pinned template cannot be opened: {e}");
            }
        }
    }

    /// The templates that are open, each with the time until which it is at least.
    pub fn cached(&self) -> Vec<(BuildId, DateTime<Utc>)> {
        let list = self.inner.templates.list(|b| self.inner.is_used(b));
        let until = |left| Utc::now() + TimeDelta::from_std(left).unwrap_or(TimeDelta::zero());
        list.into_iter().map(|(b, left)| (b, until(left))).collect()
    }

    /// Counters of the warm set.
    pub fn warm_stats(&self) -> &WarmStats {
        &self.inner.warm.stats
    }

    /// The VMM of this node, as builds name it.
    pub fn vmm(&self) -> String {
        self.inner.host.vmm.id().to_string()
    }

    /// The storage that builds are read from.
    pub fn store(&self) -> &Arc<Builds> {
        &self.inner.store
    }

    /// Releases all warm machines and makes no more. Sandboxes are their owners' to kill, and
    /// the network pool is to be shut down after them.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            let _ = task.await;
        }
        self.inner.destroy_all(self.inner.warm.close()).await;
    }
}

impl Inner {
    async fn create(
        self: Arc<Self>,
        spec: SandboxSpec,
        cancel: CancellationToken,
    ) -> Result<Sandbox, CreateError> {
        if self.stop.is_cancelled() {
            return Err(CreateError::ShuttingDown);
        }
        let in_use = {
            let _no_removal = self.lineages.removals.read().await;
            self.lineages.uses.begin(spec.build_id)
        };
        let (machine, booted_with) = self.machine(&spec, &cancel).await?;
        let gateway = match guarded::guard(&self.gateway, machine.slot(), &spec.network).await {
            Ok(gateway) => gateway,
            Err(e) => {
                self.destroy_all(vec![machine]).await;
                return Err(e);
            }
        };
        let trusts_ca = spec.network.policy.needs_ca();
        let mut sandbox =
            Sandbox { spec, machine, gateway, trusts_ca, booted_with, inner: self.clone(), in_use };
        let started = tokio::select! {
            () = cancel.cancelled() => Err(CreateError::Cancelled),
            r = sandbox.wake() => r,
        };
        // Only now: making the next one must not take the processors from this one.
        if !sandbox.spec.snapshot && !sandbox.was_booted() {
            self.want(sandbox.spec.build_id).await;
        }
        match started {
            Ok(()) => {
                sandbox.machine.record();
                Ok(sandbox)
            }
            Err(e) => {
                if let Err(also) = sandbox.kill().await {
                    tracing::warn!("while a failed sandbox was released: {also}");
                }
                Err(e)
            }
        }
    }

    /// One that stands ready, one that is made now, or one that boots, and with which kernel.
    async fn machine(
        self: &Arc<Self>,
        spec: &SandboxSpec,
        cancel: &CancellationToken,
    ) -> Result<(Machine, Option<String>), CreateError> {
        let build = spec.build_id;
        if !spec.filesystem_boot && spec.size.is_none() {
            let mut dead = Vec::new();
            let made = match self.warm.take(build, &mut dead) {
                Some(m) => Ok(m),
                None if spec.snapshot => self.prepare_once(build).await,
                None => self.prepare(build).await,
            };
            if !dead.is_empty() {
                let this = self.clone();
                tokio::spawn(async move { this.destroy_all(dead).await });
            }
            if !matches!(made, Err(CreateError::DiskAlone(_))) {
                return made.map(|m| (m, None));
            }
        }
        let template = match spec.size {
            None => self.open(build, Start::Boot).await?,
            Some(size) => {
                let _no_removal = self.lineages.removals.read().await;
                let (here, memfs) = (self.host.vmm.id(), self.memfs.clone());
                Arc::new(OpenTemplate::open_sized(&self.store, build, size, &here, memfs).await?)
            }
        };
        let files = self.builder.files_to_boot(&template.metadata.kernel_version, cancel).await?;
        let machine =
            Machine::boot(&self.parts(), template, &files.boot, &spec.network.policy.kernel_rules()).await?;
        Ok((machine, Some(files.kernel_version)))
    }

    async fn template(&self, build: BuildId) -> Result<Arc<OpenTemplate>, CreateError> {
        let _one = self.templates.opening.lock().await;
        if let Some(t) = self.templates.get(build) {
            return Ok(t);
        }
        let t = self.open(build, Start::Restore).await?;
        let _no_removal = self.lineages.removals.read().await;
        // One that was removed since has been forgotten already.
        if !self.store.exists(build).await? {
            return Err(CreateError::TemplateNotFound(build));
        }
        self.templates.keep(build, t.clone());
        Ok(t)
    }

    fn is_used(&self, build: BuildId) -> bool {
        self.lineages.uses.count(build) > 0
    }

    async fn prepare(&self, build: BuildId) -> Result<Machine, CreateError> {
        self.prepare_from(self.template(build).await?).await
    }

    /// One that is to stand ready.
    async fn prepare_ahead(&self, build: BuildId) -> Result<Machine, CreateError> {
        let mut machine = self.prepare(build).await?;
        if !self.config.rehearse {
            return Ok(machine);
        }
        let rehearsed = tokio::select! {
            () = self.stop.cancelled() => Err(CreateError::ShuttingDown),
            r = rehearse(&mut machine, self.config.envd_limit) => r,
        };
        match rehearsed {
            Ok(()) => Ok(machine),
            Err(e) => {
                self.destroy_all(vec![machine]).await;
                Err(e)
            }
        }
    }

    /// Of a build that is not kept open for others.
    async fn prepare_once(&self, build: BuildId) -> Result<Machine, CreateError> {
        self.prepare_from(self.open(build, Start::Restore).await?).await
    }

    /// The build as others have it open, or opened now.
    async fn open(&self, build: BuildId, start: Start) -> Result<Arc<OpenTemplate>, CreateError> {
        if let Some(t) = self.opened.get(build, start) {
            return Ok(t);
        }
        let _no_removal = self.lineages.removals.read().await;
        let (here, memfs) = (self.host.vmm.id(), self.memfs.clone());
        let opened = OpenTemplate::open(&self.store, build, start, &here, memfs).await?;
        Ok(self.opened.keep(build, Arc::new(opened)))
    }

    async fn prepare_from(&self, template: Arc<OpenTemplate>) -> Result<Machine, CreateError> {
        Machine::prepare(&self.parts(), template).await
    }

    fn parts(&self) -> Parts<'_> {
        Parts { host: &self.host, overlays: &self.config.overlays }
    }

    async fn want(&self, build: BuildId) {
        if self.config.warm == 0 || self.stop.is_cancelled() {
            return;
        }
        let out = self.warm.want(build);
        self.wake.notify_one();
        self.destroy_all(out).await;
    }

    async fn destroy_all(&self, machines: Vec<Machine>) {
        for m in machines {
            if let Err(e) = m.destroy(&self.host.network).await {
                tracing::warn!("while a warm machine was released: {e}");
            }
        }
    }
}

/// Makes machines until every wanted build has its share, one at a time.
async fn refill(inner: Arc<Inner>) {
    let mut pause = Duration::ZERO;
    loop {
        let next = inner.warm.lacking(inner.config.warm);
        let Some(build) = next else {
            tokio::select! {
                () = inner.stop.cancelled() => return,
                () = inner.wake.notified() => continue,
            }
        };
        let made = inner.prepare_ahead(build).await;
        if inner.stop.is_cancelled() {
            if let Ok(m) = made {
                inner.destroy_all(vec![m]).await;
            }
            return;
        }
        match made {
            Ok(m) => {
                pause = Duration::ZERO;
                inner.destroy_all(inner.warm.put(build, m).into_iter().collect()).await;
            }
            Err(e)
                if e.is_damage()
                    || matches!(
                        e,
                        CreateError::TemplateNotFound(_)
                            | CreateError::Template(_)
                            | CreateError::DiskAlone(_)
                    ) =>
            {
                tracing::warn!(%build, "this build cannot be kept warm: {e}");
                inner.destroy_all(inner.warm.forget(build)).await;
            }
            Err(e) => {
                pause = (pause * 2).clamp(Duration::from_millis(200), Duration::from_secs(10));
                tracing::warn!(%build, retry_in = ?pause, "cannot make a warm machine: {e}");
                tokio::select! {
                    () = inner.stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

/// Closes templates that were not used for their time, with their warm machines.
async fn close_unused(inner: Arc<Inner>) {
    loop {
        let (closed, wait) = inner.templates.expired(|b| inner.is_used(b));
        for (build, template) in closed {
            inner.destroy_all(inner.warm.forget(build)).await;
            drop(template);
            tracing::info!(%build, "closed a template that was not used");
        }
        tokio::select! {
            () = inner.stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// A running sandbox. Its owner ends it with [`Sandbox::kill`].
pub struct Sandbox {
    pub(crate) spec: SandboxSpec,
    machine: Machine,
    /// Between its slot and everything that its policy wants looked at.
    pub(crate) gateway: SlotGateway,
    /// Whether its guest was told to trust the gateway's certificates.
    pub(crate) trusts_ca: bool,
    /// Version of the kernel, if it was not resumed.
    booted_with: Option<String>,
    inner: Arc<Inner>,
    /// Keeps the build that it was resumed from.
    in_use: Use,
}

impl Sandbox {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.spec.sandbox_id
    }

    /// Address at which the host reaches its guest, any port.
    pub fn host_ip(&self) -> Ipv4Addr {
        self.machine.slot().host_ip()
    }

    /// Its template.
    pub fn metadata(&self) -> &TemplateMetadata {
        &self.machine.template().metadata
    }

    /// Bytes that its guest wrote to the disk so far.
    pub fn disk_written(&self) -> u64 {
        self.machine.disk_written()
    }

    /// Whether it was booted from the disk of its build, rather than resumed.
    pub fn was_booted(&self) -> bool {
        self.booted_with.is_some()
    }

    /// Version of the kernel that runs in it.
    pub(crate) fn kernel_version(&self) -> &str {
        self.booted_with.as_ref().unwrap_or(&self.metadata().kernel_version)
    }

    /// Resolves with the reason when it can run no longer.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        self.machine.failed()
    }

    pub(crate) fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    pub(crate) fn slot(&self) -> &NetworkSlot {
        self.machine.slot()
    }

    pub(crate) fn node_gateway(&self) -> &Gateway {
        &self.inner.gateway
    }

    pub(crate) fn store(&self) -> &Builds {
        &self.inner.store
    }

    pub(crate) fn removals(&self) -> &RwLock<()> {
        &self.inner.lineages.removals
    }

    pub(crate) fn copies(&self) -> Arc<Semaphore> {
        self.inner.copies.clone()
    }

    /// What its envd knows, for those who resume a build of it.
    pub(crate) fn guest_state(&self) -> GuestState {
        GuestState { access_token: self.spec.access_token.clone(), env_vars: self.environment() }
    }

    /// Has a build that was just published looked at, whether it is to be compacted.
    pub(crate) fn compact_later(&self, build: BuildId) {
        // Nobody listens any more when the node is shutting down.
        let _ = self.inner.paused.send(build);
    }

    /// Lets the guest run and tells its envd who it is: time, entropy, token, environment.
    async fn wake(&mut self) -> Result<(), CreateError> {
        let failed = self.machine.failed();
        let limit = if self.was_booted() {
            READY_LIMIT
        } else {
            self.machine.resume().await?;
            self.inner.config.envd_limit
        };
        // Nothing but envd runs before.
        let first = first_words()?;
        let context = self.metadata().context.clone();
        let mut request = InitRequest {
            env_vars: Some(self.environment()),
            access_token: self.spec.access_token.clone(),
            default_user: Some(context.user.unwrap_or_else(|| "user".to_owned())),
            default_workdir: context.workdir,
            lifecycle_id: Some(self.spec.execution_id.clone()),
            volume_mounts: Some(self.volume_mounts()),
            ..first
        };
        self.introduce(&mut request);
        // A guest that has a token takes another one from those who know the old.
        let old_token = self.metadata().guest.as_ref().and_then(|g| g.access_token.clone());
        let envd = EnvdClient::new(SocketAddr::from((self.host_ip(), ENVD_PORT)), old_token);
        let answered = tokio::select! {
            reason = failed => Err(CreateError::Ended(reason)),
            r = envd.init(&request, limit) => r.map_err(CreateError::from),
        };
        if answered.is_err() && self.was_booted() {
            let console = self.machine.vm().console();
            tracing::warn!(sandbox = self.id(), "it did not boot; the end of its console:\n{console}");
        }
        answered?;
        // In memory it would run already.
        let m = self.metadata();
        if self.was_booted() && !m.start.command.is_empty() {
            let started = self.client()?.start(crate::start_command(&m.start, &m.context)).await;
            started.map(drop)?;
        }
        Ok(())
    }

    /// A client of its envd, as one who knows its token.
    ///
    /// # Errors
    /// When the token cannot be sent.
    pub fn client(&self) -> Result<Client, CreateError> {
        let client = Client::direct(SocketAddr::from((self.host_ip(), ENVD_PORT)));
        match &self.spec.access_token {
            Some(token) => Ok(client.access_token(token)?),
            None => Ok(client),
        }
    }

    /// Environment of its commands: what the build had, who it is, what its creator wants.
    pub(crate) fn environment(&self) -> HashMap<String, String> {
        let guest = self.metadata().guest.as_ref();
        let mut env = guest.map(|g| g.env_vars.clone()).unwrap_or_default();
        env.extend([
            ("E2B_SANDBOX".to_owned(), "true".to_owned()),
            ("E2B_SANDBOX_ID".to_owned(), self.spec.sandbox_id.clone()),
            ("E2B_TEMPLATE_ID".to_owned(), self.spec.template_id.clone()),
        ]);
        env.extend(self.spec.env_vars.clone());
        if self.trusts_ca {
            guarded::trust(&mut env);
        }
        env
    }

    /// Ends it and releases everything, in reverse order.
    pub async fn kill(self) -> Result<(), KillError> {
        let Self { spec, machine, gateway, inner, in_use, .. } = self;
        // A task of its own, so that it goes to its end when the caller goes away.
        let task = tokio::spawn(async move {
            // For those to come, of which a paused sandbox has none.
            let template = (!spec.snapshot).then(|| machine.template().clone());
            gateway.close().await;
            let destroyed = machine.destroy(&inner.host.network).await;
            // Its time begins now.
            inner.templates.get(spec.build_id);
            drop(in_use);
            if let Some(template) = template {
                // Nobody waits for the object store.
                tokio::spawn(async move { template.save_read_order().await });
            }
            destroyed
        });
        task.await.unwrap_or_else(|e| {
            tracing::error!("the release of a sandbox did not finish: {e}");
            Ok(())
        })
    }
}
