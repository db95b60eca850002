//! A build from its base to its publication.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nidus_oci::{Credentials, Reference, Registry};
use nidus_sandbox::{Factory, NetworkSpec, Use};
use nidus_storage::BuildId;
use nidus_template::{BuildLog, Builder, Context, Level, Log, Start, TemplateMetadata, check_sizes};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::env::{expand, lookup};
use crate::files::FileStore;
use crate::guest::SYSTEM_PATH;
use crate::key::LayerKey;
use crate::layers::{Layer, LayerIndex, Pruned};
use crate::machine::Work;
use crate::step::{environment, join};
use crate::{PipelineError, Step};

/// Steps that are no instruction, as clients know them.
pub(crate) const BASE: &str = "base";
pub(crate) const FINALIZE: &str = "finalize";
/// Where relative paths lie when no directory was set.
pub(crate) const HOME: &str = "/home/user";

/// Settings of a node's builds.
#[derive(Debug, Clone)]
pub struct PipelineConfig {
    /// Directory of the index of layers.
    pub layers: PathBuf,
    /// Directory of uploaded files.
    pub files: PathBuf,
    /// Most bytes of one upload.
    pub max_upload_bytes: u64,
    /// Longest time of one build.
    pub build_limit: Duration,
    /// Longest time until a template is ready.
    pub ready_limit: Duration,
    /// Digest of the programs that are put into guests: others make other bases.
    pub programs: String,
}

/// What a build begins with.
#[derive(Debug, Clone)]
pub enum Base {
    /// Debian packages of a suite.
    Debian {
        /// Name of the suite.
        suite: String,
        /// Packages beside those that every base has, in order.
        packages: Vec<String>,
    },
    /// A file of this host, as its owner configured it.
    Image {
        /// The file.
        path: PathBuf,
    },
    /// An image in a registry.
    Registry {
        /// Its name.
        reference: Reference,
        /// For its registry.
        credentials: Credentials,
    },
    /// Another template.
    Template {
        /// Its build.
        build: BuildId,
        /// Its name, for people.
        name: String,
    },
}

/// An instruction with what belongs to it.
#[derive(Debug, Clone)]
pub struct StepSpec {
    /// The instruction.
    pub step: Step,
    /// Hash of its uploaded files.
    pub files: Option<String>,
    /// It and what follows is done whether there are layers of it or not.
    pub force: bool,
}

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildSpec {
    /// Template that the build belongs to.
    pub template_id: String,
    /// Id of the new build.
    pub build_id: BuildId,
    /// Whose layers and files it uses: those of a team are no other one's.
    pub scope: String,
    /// Sizes; of a template that is built upon, what is 0 is as it has it.
    pub vcpu: u32,
    /// MiB.
    pub memory_mb: u32,
    /// MiB.
    pub disk_mb: u32,
    /// The memory consists of pages of 2 MiB.
    pub huge_pages: bool,
    /// Version of the guest's kernel; the newest one when not set.
    pub kernel: Option<String>,
    /// What it begins with.
    pub base: Base,
    /// Its instructions.
    pub steps: Vec<StepSpec>,
    /// What runs in its sandboxes.
    pub start: Start,
    /// Everything is done anew.
    pub force: bool,
    /// What its VMs may reach.
    pub network: NetworkSpec,
}

impl BuildSpec {
    /// Checks the sizes; 0 stands for those of the template that is built upon.
    ///
    /// # Errors
    /// That says which one is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        let inherits = matches!(self.base, Base::Template { .. });
        let said = |value: u32| Some(value).filter(|v| *v != 0 || !inherits);
        check_sizes(said(self.vcpu), said(self.memory_mb), said(self.disk_mb))
    }
}

/// A build that failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// Why.
    #[source]
    pub error: PipelineError,
    /// The step.
    pub step: String,
    /// The build that has the state before that step, from which a sandbox can be made.
    pub layer: Option<BuildId>,
}

/// Builds templates on this node.
pub struct Pipeline {
    pub(crate) config: PipelineConfig,
    pub(crate) builder: Arc<Builder>,
    pub(crate) factory: Arc<Factory>,
    pub(crate) registry: Registry,
    pub(crate) cache: Cache,
    files: FileStore,
    /// The VMM of this node, in words.
    pub(crate) vmm: String,
}

/// How far a build has come.
pub(crate) struct Run<'a> {
    pub spec: &'a BuildSpec,
    pub cancel: &'a CancellationToken,
    /// Keeps the layers that it uses.
    pub held: Vec<Use>,
    pub log: Log,
    /// From here on nothing is taken from the cache.
    pub forced: bool,
    pub executed: usize,
    pub cached: usize,
    /// The last layer.
    pub layer: Option<BuildId>,
}

impl Pipeline {
    /// A pipeline over this node's parts.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn new(
        config: PipelineConfig,
        builder: Arc<Builder>,
        factory: Arc<Factory>,
        registry: Registry,
        vmm: String,
    ) -> Result<Self, PipelineError> {
        let index = LayerIndex::open(config.layers.clone())
            .map_err(|e| PipelineError::io(format!("open {}", config.layers.display()), e))?;
        let files = FileStore::open(config.files.clone(), config.max_upload_bytes)?;
        let cache = Cache::new(index, factory.clone());
        Ok(Self { config, builder, factory, registry, cache, files, vmm })
    }

    /// Uploaded files.
    pub fn files(&self) -> &FileStore {
        &self.files
    }

    /// The index of layers.
    pub fn layers(&self) -> &LayerIndex {
        &self.cache.index
    }

    /// Forgets layers that were not used for the longest time until the rest has at most `bytes`, and removes
    /// their builds if nothing needs them.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub async fn prune(&self, bytes: u64) -> Result<Pruned, PipelineError> {
        self.cache.prune(bytes).await
    }

    /// Runs a build to its end and publishes it. A failed or cancelled one leaves the layers that it has made, and
    /// nothing else.
    ///
    /// # Errors
    /// With the step that failed, and the layer before it.
    pub async fn run(
        &self,
        spec: &BuildSpec,
        log: mpsc::UnboundedSender<BuildLog>,
        cancel: &CancellationToken,
    ) -> Result<TemplateMetadata, Failed> {
        let stop = cancel.child_token();
        let mut run = Run {
            spec,
            cancel: &stop,
            held: Vec::new(),
            log: Log::new(log, BASE),
            forced: spec.force,
            executed: 0,
            cached: 0,
            layer: None,
        };
        let limit = self.config.build_limit;
        let result = {
            let mut work = std::pin::pin!(self.build(&mut run));
            tokio::select! {
                result = &mut work => result,
                () = tokio::time::sleep(limit) => {
                    stop.cancel();
                    work.await.and(Err(PipelineError::TooLong(limit.as_secs()))).map_err(|e| match e {
                        PipelineError::Cancelled => PipelineError::TooLong(limit.as_secs()),
                        e => e,
                    })
                }
            }
        };
        result.map_err(|error| {
            run.log.at(Level::Error, error.to_string());
            Failed { error, step: run.log.step().to_owned(), layer: run.layer }
        })
    }

    async fn build(&self, run: &mut Run<'_>) -> Result<TemplateMetadata, PipelineError> {
        let spec = run.spec;
        let began = Instant::now();
        let plain = spec.steps.is_empty() && spec.start.is_empty();
        let (mut key, mut layer) = match &spec.base {
            Base::Template { build, name } => self.base_of_template(run, *build, name).await?,
            base => match self.base_of_source(run, base, plain).await? {
                Based::Layer(key, layer) => (key, *layer),
                Based::Published(metadata) => return Ok(*metadata),
            },
        };
        run.layer = Some(layer.build_id);
        let count = spec.steps.len();
        for (n, step) in spec.steps.iter().enumerate() {
            run.log = run.log.of((n + 1).to_string());
            run.forced |= step.force;
            let title = format!("[{}/{count}] {}", n + 1, step.step.title());
            key = LayerKey::of("step", &(&spec.scope, key, step.step.words(), &step.files));
            layer = match self.find(run, key, &title).await? {
                Found::Cached(layer) => layer,
                Found::Make(turn) => {
                    let made = self.step(run, step, &layer, &title).await?;
                    self.keep(run, key, made, turn).await?
                }
            };
            run.layer = Some(layer.build_id);
        }
        run.log = run.log.of(FINALIZE);
        // What was started is in memory already, unless something is said anew.
        let restart = !spec.start.is_empty();
        let start = if restart { spec.start.clone() } else { layer.start.clone() };
        if !plain {
            key = LayerKey::of("finalize", &(key, &start.command, &start.ready, restart));
            let title = if restart { "starting what the template starts" } else { "finishing" };
            layer = match self.find(run, key, title).await? {
                Found::Cached(layer) => layer,
                Found::Make(turn) => {
                    let made = self.finish(run, &layer, start, restart).await?;
                    self.keep(run, key, made, turn).await?
                }
            };
        }
        let metadata = self.factory.republish(layer.build_id, spec.build_id, &spec.template_id).await?;
        // What was built is used next, and a program that was never asked is slow to answer.
        if metadata.start.can_be_rehearsed() {
            self.factory.prewarm(spec.build_id).await;
        }
        run.log.info(format!(
            "build {} is ready after {:.1} s: {} steps done, {} from the cache",
            spec.build_id,
            began.elapsed().as_secs_f64(),
            run.executed,
            run.cached
        ));
        Ok(metadata)
    }

    /// The layer of a key from the cache, or the turn to make it: one build makes it, others wait for that.
    pub(crate) async fn find(
        &self,
        run: &mut Run<'_>,
        key: LayerKey,
        title: &str,
    ) -> Result<Found, PipelineError> {
        let turn = self.cache.turn(key);
        let turn = tokio::select! {
            () = run.cancel.cancelled() => return Err(PipelineError::Cancelled),
            turn = turn.lock_owned() => turn,
        };
        if !run.forced
            && let Some(layer) = self.cache.find(key, &mut run.held).await?
        {
            run.log.info(format!("CACHED {title}"));
            run.cached += 1;
            return Ok(Found::Cached(layer));
        }
        run.log.info(title.to_owned());
        Ok(Found::Make(Turn { began: Instant::now(), _turn: turn }))
    }

    /// Notes a layer that was made.
    pub(crate) async fn keep(
        &self,
        run: &mut Run<'_>,
        key: LayerKey,
        layer: Layer,
        turn: Turn,
    ) -> Result<Layer, PipelineError> {
        self.cache.put(key, &layer, &mut run.held).await?;
        run.executed += 1;
        run.log.info(format!("DONE {:.1} s", turn.began.elapsed().as_secs_f64()));
        Ok(layer)
    }

    /// What an instruction makes of a layer.
    async fn step(
        &self,
        run: &Run<'_>,
        step: &StepSpec,
        from: &Layer,
        title: &str,
    ) -> Result<Layer, PipelineError> {
        let mut next = Layer { owned: false, bytes: 0, what: title.to_owned(), ..from.clone() };
        let env = environment(&from.context.env_vars, &from.args);
        let archive = match &step.files {
            Some(hash) if matches!(step.step, Step::Copy { .. }) => {
                Some(self.files.get(&run.spec.scope, hash).await?)
            }
            _ => None,
        };
        let work = match &step.step {
            Step::Env(pairs) => {
                let pairs = expanded(pairs, &env);
                // Login shells set their own path unless they are told otherwise.
                let path = pairs.iter().rev().find(|(name, _)| name == "PATH").map(|(_, v)| v.clone());
                next.context.env_vars.extend(pairs);
                match path {
                    None => return Ok(next),
                    Some(path) => Work::Path(path),
                }
            }
            Step::Arg(pairs) => {
                next.args.extend(expanded(pairs, &env));
                return Ok(next);
            }
            Step::Workdir(dir) => {
                let dir = expand(dir, &|n| value(&env, n));
                let dir = join(from.context.workdir.as_deref().unwrap_or(HOME), &dir);
                next.context.workdir = Some(dir.clone());
                Work::Directory { path: dir, owner: user_of(&from.context).to_owned() }
            }
            Step::User(name) => {
                let name = name.split(':').next().unwrap_or(name).to_owned();
                next.context.user = Some(name.clone());
                Work::User(name)
            }
            Step::Run { command, user } => Work::Run {
                command: command.clone(),
                context: Context {
                    user: Some(user.clone().unwrap_or_else(|| user_of(&from.context).to_owned())),
                    workdir: from.context.workdir.clone(),
                    env_vars: env,
                },
            },
            Step::Copy { source, target, owner, mode } => Work::Copy {
                source: source.clone(),
                target: expand(target, &|n| value(&env, n)),
                owner: owner.clone().unwrap_or_else(|| user_of(&from.context).to_owned()),
                mode: *mode,
                directory: from.context.workdir.clone().unwrap_or_else(|| HOME.to_owned()),
                archive: archive.ok_or_else(|| {
                    PipelineError::BadRequest("COPY has no files: filesHash is missing".to_owned())
                })?,
            },
        };
        self.in_machine(run, from, None, work, &mut next).await?;
        Ok(next)
    }

    /// The last layer of a template.
    async fn finish(
        &self,
        run: &Run<'_>,
        from: &Layer,
        start: Start,
        restart: bool,
    ) -> Result<Layer, PipelineError> {
        let mut next = Layer { start: start.clone(), what: "a template's end".to_owned(), ..from.clone() };
        let work = Work::Finalize { start, context: from.context.clone(), restart };
        self.in_machine(run, from, None, work, &mut next).await?;
        Ok(next)
    }
}

fn user_of(context: &Context) -> &str {
    context.user.as_deref().unwrap_or("user")
}

/// A variable in an instruction. Images always have a path; systems made of packages need not say it.
fn value(env: &BTreeMap<String, String>, name: &str) -> Option<String> {
    lookup(&[env], name).or_else(|| (name == "PATH").then(|| SYSTEM_PATH.to_owned()))
}

fn expanded(pairs: &[(String, String)], env: &BTreeMap<String, String>) -> Vec<(String, String)> {
    pairs.iter().map(|(name, text)| (name.clone(), expand(text, &|n| value(env, n)))).collect()
}

/// What a base is.
pub(crate) enum Based {
    /// A layer.
    Layer(LayerKey, Box<Layer>),
    /// The template itself: nothing was to be done after its base.
    Published(Box<TemplateMetadata>),
}

/// A layer, or the turn to make it.
pub(crate) enum Found {
    Cached(Layer),
    Make(Turn),
}

/// The turn to make a layer.
pub(crate) struct Turn {
    began: Instant,
    _turn: OwnedMutexGuard<()>,
}
