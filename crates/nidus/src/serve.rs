//! `nidus serve`: every part in its order, and back in reverse.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nidus_api::{Api, ApiConfig, MasterKey, Nodes, TemplateSpec, VMM_LABEL};
use nidus_build::{Pipeline, PipelineConfig};
use nidus_egress::Gateway;
use nidus_network::{NetworkConfig, Pool, TapMode};
use nidus_oci::Registry;
use nidus_orchestrator::{Exports, NetworkParts, Node, NodeConfig};
use nidus_proxy::{InProcessCatalog, Listeners};
use nidus_sandbox::{Factory, FactoryConfig};
use nidus_storage::BuildId;
use nidus_telemetry::{
    EventLogs, Fanout, LogFanout, LogLimits, LogSink, MemoryLogs, RunningSink, Sink, TracingLogs,
};
use nidus_template::{BuildConfig, Builder, VmHost};
use nidus_vmm::DriverId;
use nidus_vmm::cgroup::CgroupRoot;
use nidus_volume::Volumes;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::builds::NodeBuilds;
use crate::client::database;
use crate::config::{Config, VmmChoice};
use crate::driver::{self, Probes};
use crate::lock::{DataLock, RunDir, SLOTS_PER_DAEMON, SlotRange};
use crate::recipe::{MadeWith, Recipe};
use crate::resuming::ResumingCatalog;

/// Room that a template's build takes while it is made, in MiB.
pub const BUILD_MIB: u64 = 2048;
/// Less is a full disk: the database could not be written.
const LEAST_MIB: u64 = 16;
/// Name under which this host's kernel block devices are ours, over restarts.
const INSTANCE: &str = "nidus";
/// Longest wait for envd in a resumed guest.
const ENVD_LIMIT: Duration = Duration::from_secs(60);
/// Wait for the first warm machine before the API says that it is ready; it would work without.
const WARM_LIMIT: Duration = Duration::from_secs(20);
/// Longest time until what a template starts is ready.
const TEMPLATE_READY_LIMIT: Duration = Duration::from_secs(600);

/// MiB that can be written below `dir`.
pub fn free_mib(dir: &Path) -> anyhow::Result<u64> {
    let s = nix::sys::statvfs::statvfs(dir)
        .with_context(|| format!("Cannot look at the disk of {}", dir.display()))?;
    Ok((s.blocks_available() * s.fragment_size()) >> 20)
}

async fn bind(what: &str, variable: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("The {what}'s address {address} is already in use: end the program that has it, or set {variable}")
        }
        _ => anyhow!("The {what} cannot listen on {address}: {e}; set {variable}"),
    })
}

/// Runs until a signal. An error is one sentence, and everything is released then too.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let began = Instant::now();
    if !nix::unistd::geteuid().is_root() {
        bail!("nidus serve needs root (network namespaces, taps, control groups): run it with sudo");
    }
    let stop = CancellationToken::new();
    watch_signals(stop.clone())?;
    let dir = &config.data_dir;
    std::fs::create_dir_all(dir)
        .with_context(|| format!("Cannot make the data directory {}", dir.display()))?;
    let _lock = DataLock::take(dir)?;
    let free = free_mib(dir)?;
    if free < LEAST_MIB {
        bail!("The disk of {} is full: {free} MiB are free, {LEAST_MIB} are the least", dir.display());
    }
    let api = bind("API", "NIDUS_API_ADDR", config.api_addr).await?;
    let plain = bind("proxy", "NIDUS_PROXY_ADDR", config.proxy_addr).await?;
    let tls = match config.proxy_tls()? {
        Some((address, certificate)) => {
            Some((bind("proxy (TLS)", "NIDUS_PROXY_TLS_ADDR", address).await?, certificate))
        }
        None => None,
    };
    let proxy = Listeners { plain, tls };
    let node = bind("node", "NIDUS_NODE_ADDR", config.node_addr).await?;
    let parts = Parts::start(config, &stop).await?;
    let served = parts.serve(config, [api, node], proxy, &stop, began).await;
    tracing::info!("stopping");
    let ended = Instant::now();
    parts.release().await;
    if served.is_ok() {
        tracing::info!("stopped after {:.1} s, everything is released", ended.elapsed().as_secs_f64());
    }
    served
}

fn watch_signals(stop: CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !first {
                tracing::warn!("a second signal: not waiting any more; the next start removes what is left");
                std::process::exit(130);
            }
            stop.cancel();
        }
    });
    Ok(())
}

/// What the services are made of, in the order of their making.
struct Parts {
    _run: RunDir,
    _range: SlotRange,
    stored: NodeBuilds,
    cgroups: CgroupRoot,
    network: Arc<Pool>,
    host: Arc<VmHost>,
    factory: Arc<Factory>,
    node: Arc<Node>,
    catalog: InProcessCatalog,
    made_with: MadeWith,
}

impl Parts {
    async fn start(config: &Config, stop: &CancellationToken) -> anyhow::Result<Self> {
        let dir = &config.data_dir;
        let envd = config.program(config.envd.as_ref(), "envd")?;
        let guest_init = config.program(config.guest_init.as_ref(), "guest-init")?;
        // First of all, so that nothing has been done when it is missing.
        if config.vmm != VmmChoice::Firecracker {
            nidus_vmm::qemu::probe::find(&config.qemu).await?;
        }
        let mut free = SlotRange::take_free()?;
        let network_of = |range: &SlotRange, tap| NetworkConfig {
            table: range.name('_'),
            first_index: range.first_index(),
            max_slots: SLOTS_PER_DAEMON,
            host_range: config.host_range,
            pair_range: config.pair_range,
            tap,
            allowed_private: config.allowed_private.clone(),
            max_bandwidth: config.sandbox_bandwidth,
            max_connections: config.sandbox_connections,
            ..NetworkConfig::default()
        };
        // What nobody holds was left by a daemon that was killed: disks first, then VMs, then networks.
        VmHost::reclaim(INSTANCE).await;
        for range in &free {
            let groups = CgroupRoot::new(&range.name('-'))?;
            let vms = groups.reclaim()?;
            groups.remove();
            let network = network_of(range, TapMode::Open);
            let slots = tokio::task::spawn_blocking(move || nidus_network::reclaim(&network)).await??;
            if vms + slots > 0 {
                tracing::warn!(vms, slots, "removed what an earlier daemon left behind");
            }
        }
        let range = free.remove(0);
        drop(free);
        let run = RunDir(dir.join("run"));
        let running = run.0.join("sandboxes");
        let (running, lost) = tokio::task::spawn_blocking(move || RunningSink::open(&running))
            .await?
            .context("Cannot keep which sandboxes run")?;
        let kept_logs = Arc::new(MemoryLogs::new(LogLimits::default()));
        let logs = Arc::new(LogFanout::new(vec![Arc::new(TracingLogs), kept_logs.clone()]));
        let of_events = Arc::new(EventLogs::new(kept_logs.clone()));
        let events = Fanout::new(vec![Arc::new(LogSink), Arc::new(running), of_events]);
        for event in &lost {
            events.emit(event);
        }
        let exports = open_volumes(dir)?;
        let gateway = Gateway::new(config.gateway()?)?;
        let stored = NodeBuilds::open(config).await?;
        let store = stored.builds.clone();
        let build = BuildConfig {
            kernels: dir.join("kernels"),
            work: dir.join("build"),
            envd,
            guest_init: guest_init.clone(),
        };
        Builder::reclaim(&build)?;
        let kernel = nidus_template::ensure_kernel(&build.kernels, stop, |l| tracing::info!("{l}")).await?;
        let cgroups = CgroupRoot::new(&range.name('-'))?;
        let probes = Probes { config, kernel: &kernel, guest_init: &guest_init };
        let (vmm, reason) =
            driver::choose(&probes, cgroups.clone()).await.inspect_err(|_| cgroups.remove())?;
        let id = vmm.id();
        if id.accel == "tcg" {
            tracing::warn!("{reason}; guests run on {id}, some ten times slower than with hardware");
        } else {
            tracing::info!("{reason}; guests run on {id}");
        }
        let made_with = MadeWith {
            programs: crate::recipe::programs(&[&build.envd, &guest_init])?,
            kernel: kernel.version.clone(),
            vmm: id.to_string(),
        };
        let tap = nidus_template::tap_mode(&vmm.needs(), config.uid_base);
        let network = Pool::start(network_of(&range, tap), config.slots).await;
        let network = Arc::new(network.inspect_err(|_| cgroups.remove())?);
        let overlays = run.0.join("overlays");
        let factory = FactoryConfig {
            overlays,
            warm: config.warm,
            rehearse: config.rehearse,
            envd_limit: ENVD_LIMIT,
            template_ttl: Duration::from_secs(config.template_ttl_s),
        };
        let pipeline = PipelineConfig {
            layers: config.layers_dir(),
            files: dir.join("build-files"),
            max_upload_bytes: config.upload_limit_mb << 20,
            build_limit: Duration::from_secs(config.build_timeout_s),
            ready_limit: TEMPLATE_READY_LIMIT,
            programs: made_with.programs.clone(),
        };
        let started = async {
            let registry = Registry::new(config.registry_settings())?;
            let host = VmHost::open(vmm.clone(), network.clone(), config.uid_base, INSTANCE).await?;
            let host = Arc::new(host);
            let builder = Arc::new(Builder::new(build, store.clone(), host.clone()));
            let factory = Factory::start(factory, store, host.clone(), builder.clone(), gateway.clone())?;
            let factory = Arc::new(factory);
            let pipeline = Pipeline::new(pipeline, builder, factory.clone(), registry, vmm.id().to_string());
            match pipeline {
                Ok(pipeline) => Ok::<_, anyhow::Error>((host, Arc::new(pipeline), factory)),
                Err(e) => {
                    factory.shutdown().await;
                    Err(e.into())
                }
            }
        };
        let (host, pipeline, factory) = match started.await {
            Ok(parts) => parts,
            Err(e) => {
                network.shutdown().await;
                cgroups.remove();
                return Err(e);
            }
        };
        let catalog = InProcessCatalog::new();
        let node = NodeConfig {
            node_id: node_id(config)?,
            labels: labels(config, &id),
            max_sandboxes: config.max_sandboxes,
            max_starting: config.max_starting,
            start_limit: Duration::from_secs(60),
            default_disk_mb: config.disk_mb,
            huge_pages: config.huge_pages,
            local_images: config.local_images.clone(),
            url: format!("http://{}", config.node_addr),
            max_builds: config.max_builds,
            layer_cache_bytes: config.layer_cache_mb << 20,
            metrics_every: Duration::from_secs(config.metrics_interval_s),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            data_dir: dir.clone(),
        };
        let node = Node::new(
            node,
            factory.clone(),
            pipeline,
            catalog.clone(),
            Arc::new(events),
            NetworkParts { gateway, exports, logs, kept_logs },
        );
        Ok(Self {
            _run: run,
            _range: range,
            stored,
            cgroups,
            network,
            host,
            factory,
            node,
            catalog,
            made_with,
        })
    }

    /// Serves until `stop`, or until the base template cannot be had.
    async fn serve(
        &self,
        config: &Config,
        [api_listener, node_listener]: [TcpListener; 2],
        proxy_listeners: Listeners,
        stop: &CancellationToken,
        began: Instant,
    ) -> anyhow::Result<()> {
        let store = database(config).await?;
        let nodes = Nodes::connect_lazy(config.node_addr)?;
        let api = ApiConfig {
            domain: config.domain.clone(),
            admin_token: config.admin_token.clone(),
            request_rate: config.request_rate,
            ..ApiConfig::new(MasterKey::open(&config.data_dir.join("master.key"))?)
        };
        let api = Api::new(api, store.clone(), nodes);
        // Each service its own stop, so that they end one after the other.
        let (node_stop, api_stop, proxy_stop) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let node =
            tokio::spawn(nidus_orchestrator::serve(node_listener, self.node.clone(), node_stop.clone()));
        let api_task = tokio::spawn(nidus_api::serve(api_listener, api.clone(), api_stop.clone()));
        let catalog = Arc::new(ResumingCatalog { running: self.catalog.clone(), api: api.clone() });
        if let Some((listener, certificate)) = &proxy_listeners.tls {
            tracing::info!("proxy with TLS on {}", listener.local_addr()?);
            tokio::spawn(certificate.clone().follow(proxy_stop.clone()));
        }
        let proxy = nidus_proxy::serve(proxy_listeners, config.proxy(), catalog, proxy_stop.clone());
        let proxy = tokio::spawn(proxy);
        tracing::info!(
            "API on http://{}, proxy on http://{}, node on {}",
            config.api_addr,
            config.proxy_addr,
            config.node_addr
        );
        let result = tokio::select! {
            () = stop.cancelled() => Ok(()),
            r = self.make_ready(config, &api) => match r {
                Ok(()) => {
                    api.set_ready(true);
                    tracing::info!("ready after {:.1} s: template {} can be used", began.elapsed().as_secs_f64(), config.base_template);
                    stop.run_until_cancelled(self.keep_pinned(config, &api)).await;
                    Ok(())
                }
                Err(e) => Err(e),
            },
        };
        api.set_ready(false);
        // No new requests, then no sandboxes, then nobody to ask.
        for (name, stop, task) in [("API", api_stop, api_task), ("proxy", proxy_stop, proxy)] {
            stop.cancel();
            ended(name, task.await);
        }
        self.node.shutdown().await;
        node_stop.cancel();
        ended("node", node.await);
        store.close().await;
        result
    }

    /// Sees to the base template and a machine of it.
    async fn make_ready(&self, config: &Config, api: &Arc<Api>) -> anyhow::Result<()> {
        let name = &config.base_template;
        let spec = TemplateSpec {
            from_image: config.base_image.clone(),
            cpu_count: config.base_cpu,
            memory_mb: config.base_memory_mb,
            public: true,
        };
        let recipe = Recipe::of(config, &self.made_with)?;
        let known = Recipe::load(&config.data_dir);
        let build = match api.ready_build(name).await? {
            // One that somebody else made of this name is theirs to make again.
            Some(b) if known.as_ref().is_none_or(|k| k.build != b || k.digest == recipe) => b,
            older => {
                match older {
                    None => tracing::info!("building the template {name}: once, and for some minutes"),
                    Some(_) => {
                        tracing::info!("building the template {name} again: what it is made of has changed")
                    }
                }
                enough_space(config, name)?;
                // The node logs each step.
                let built = api.build_template(name, spec).await;
                let built = built
                    .map_err(|e| anyhow!("The template {name} cannot be built: {}", one_line(&e.message)))?;
                Recipe { build: built.clone(), digest: recipe }.save(&config.data_dir)?;
                built
            }
        };
        let build = build.parse()?;
        self.factory.prewarm(build).await;
        if config.warm > 0 {
            let end = Instant::now() + WARM_LIMIT;
            while self.factory.warm_count(build) == 0 && Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    /// Tells the factory which builds are pinned, now and whenever a template has a new one.
    async fn keep_pinned(&self, config: &Config, api: &Api) {
        loop {
            let mut builds = HashSet::new();
            for name in config.pinned() {
                match api.build_of(name).await {
                    Ok(Some(build)) => builds.extend(build.parse::<BuildId>()),
                    Ok(None) => tracing::warn!("{name}, which is to be pinned, has no build that is ready"),
                    Err(e) => tracing::warn!("cannot find out which build of {name} is to be pinned: {e}"),
                }
            }
            self.factory.pin(builds).await;
            api.built().await;
        }
    }

    /// Everything back, last first.
    async fn release(self) {
        let Self { _run, _range, stored, cgroups, network, host, factory, node, catalog, made_with: _ } =
            self;
        drop((node, catalog));
        factory.shutdown().await;
        drop(factory);
        host.shutdown().await;
        network.shutdown().await;
        cgroups.remove();
        stored.release().await;
    }
}

/// The directory of volumes, without what deletions that were cut off have left.
fn open_volumes(dir: &Path) -> anyhow::Result<Exports> {
    let path = dir.join("volumes");
    let open = || {
        let volumes = Volumes::open(path.clone(), nidus_volume::Limits::default())?;
        volumes.reclaim()?;
        Exports::new(Arc::new(volumes))
    };
    open().with_context(|| format!("Cannot use the directory of volumes {}", path.display()))
}

/// The configured labels and the one that says which snapshots can be loaded here.
fn labels(config: &Config, vmm: &DriverId) -> Vec<String> {
    let mut labels = config.node_labels.clone();
    labels.push(format!("{VMM_LABEL}{vmm}"));
    labels
}

fn enough_space(config: &Config, name: &str) -> anyhow::Result<()> {
    let free = free_mib(&config.data_dir)?;
    if free < BUILD_MIB {
        bail!(
            "There is no space to build the template {name}: {free} MiB are free at {}, {BUILD_MIB} are needed",
            config.data_dir.display()
        );
    }
    Ok(())
}

/// The last lines of a tool's output are what matters, and a sentence is wanted.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let mut line = lines.first().copied().unwrap_or_default().to_owned();
    if let Some(last) = lines.last().filter(|_| lines.len() > 1) {
        line.push(' ');
        line.push_str(last);
    }
    line.chars().take(300).collect()
}

fn ended(name: &str, task: Result<std::io::Result<()>, tokio::task::JoinError>) {
    match task {
        Ok(Ok(())) => tracing::debug!("the {name} ended"),
        Ok(Err(e)) => tracing::warn!("the {name} ended with an error: {e}"),
        Err(e) => tracing::error!("the {name} did not end well: {e}"),
    }
}

/// Kept over restarts, unless it is configured.
fn node_id(config: &Config) -> anyhow::Result<String> {
    if let Some(id) = &config.node_id {
        return Ok(id.clone());
    }
    let path = config.data_dir.join("node-id");
    if let Ok(id) = std::fs::read_to_string(&path)
        && !id.trim().is_empty()
    {
        return Ok(id.trim().to_owned());
    }
    let id = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();
    std::fs::write(&path, &id).with_context(|| format!("Cannot write {}", path.display()))?;
    Ok(id)
}
