//! Template builds: one task each, with its log.

use std::collections::HashMap;
use std::sync::Arc;

use nidus_build::{BuildSpec, Pipeline};
use nidus_storage::{Artifact, BuildId};
use nidus_template::{BuildLog, Level, TemplateMetadata};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Lines kept of one build.
const MAX_LINES: usize = 20_000;
/// Finished builds whose log is kept.
const MAX_FINISHED: usize = 64;

/// How a build stands.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    Running,
    Done(Box<TemplateMetadata>),
    Failed { message: String, step: Option<String>, layer: Option<BuildId> },
}

/// A build and what it said so far.
pub(crate) struct Build {
    pub progress: watch::Sender<Progress>,
    pub log: Mutex<Vec<BuildLog>>,
    cancel: CancellationToken,
    released: watch::Sender<bool>,
}

/// All builds of a node. Some run at a time: each needs a processor for itself.
pub(crate) struct Builds {
    pub pipeline: Arc<Pipeline>,
    /// What layers may take together.
    cache_bytes: u64,
    store: Arc<nidus_storage::Builds>,
    all: Mutex<HashMap<BuildId, Arc<Build>>>,
    turn: Arc<Semaphore>,
}

impl Builds {
    pub fn new(
        pipeline: Arc<Pipeline>,
        store: Arc<nidus_storage::Builds>,
        at_once: usize,
        cache_bytes: u64,
    ) -> Self {
        let turn = Arc::new(Semaphore::new(at_once.max(1)));
        Self { pipeline, cache_bytes, store, all: Default::default(), turn }
    }

    /// Starts a build; `None` when there is one of this id.
    pub fn start(&self, spec: BuildSpec) -> Option<()> {
        let id = spec.build_id;
        let build = Arc::new(Build {
            progress: watch::Sender::new(Progress::Running),
            log: Default::default(),
            cancel: CancellationToken::new(),
            released: watch::Sender::new(false),
        });
        {
            let mut all = self.all.lock();
            if all.contains_key(&id) {
                return None;
            }
            if all.len() >= MAX_FINISHED {
                let old = all.iter().find(|(_, b)| *b.released.borrow()).map(|(id, _)| *id);
                if let Some(old) = old {
                    all.remove(&old);
                }
            }
            all.insert(id, build.clone());
        }
        let (pipeline, turn, cache_bytes) = (self.pipeline.clone(), self.turn.clone(), self.cache_bytes);
        tokio::spawn(async move {
            run(&pipeline, &turn, &build, spec).await;
            build.released.send_replace(true);
            match pipeline.prune(cache_bytes).await {
                Ok(p) if p.layers == 0 => {}
                Ok(p) => {
                    tracing::info!(layers = p.layers, bytes = p.bytes, "made room among the layers of builds")
                }
                Err(e) => tracing::warn!("the layers of builds were not kept small: {e}"),
            }
        });
        Some(())
    }

    /// A build that this daemon ran.
    pub fn get(&self, id: BuildId) -> Option<Arc<Build>> {
        self.all.lock().get(&id).cloned()
    }

    /// Metadata of a build in storage.
    pub async fn stored(&self, id: BuildId) -> Option<TemplateMetadata> {
        if !self.store.exists(id).await.unwrap_or(false) {
            return None;
        }
        let text = self.store.read(id, Artifact::Metadata).await;
        let text = text.inspect_err(|e| tracing::warn!("a stored build cannot be used: {e}")).ok()?;
        TemplateMetadata::parse(id, &text).ok()
    }

    /// Cancels it if it runs, and waits until nothing of it is left in work.
    pub async fn end(&self, id: BuildId) {
        let build = self.all.lock().remove(&id);
        if let Some(build) = build {
            build.end().await;
        }
    }

    /// Cancels all.
    pub async fn shutdown(&self) {
        let all: Vec<Arc<Build>> = self.all.lock().values().cloned().collect();
        for build in &all {
            build.cancel.cancel();
        }
        for build in &all {
            build.end().await;
        }
    }
}

impl Build {
    async fn end(&self) {
        self.cancel.cancel();
        let _ = self.released.subscribe().wait_for(|r| *r).await;
    }

    fn add(&self, line: BuildLog) {
        match line.level {
            Level::Debug => tracing::debug!(target: "nidus::build", step = %line.step, "{}", line.message),
            Level::Info => tracing::info!(target: "nidus::build", step = %line.step, "{}", line.message),
            _ => tracing::warn!(target: "nidus::build", step = %line.step, "{}", line.message),
        }
        let mut log = self.log.lock();
        if log.len() < MAX_LINES {
            log.push(line);
        }
    }
}

async fn run(pipeline: &Pipeline, turn: &Semaphore, build: &Build, spec: BuildSpec) {
    let turn = tokio::select! {
        () = build.cancel.cancelled() => None,
        turn = turn.acquire() => turn.ok(),
    };
    if turn.is_none() {
        let message = "the build was cancelled".into();
        build.progress.send_replace(Progress::Failed { message, step: None, layer: None });
        return;
    }
    let (sender, mut lines) = mpsc::unbounded_channel();
    let work = pipeline.run(&spec, sender, &build.cancel);
    tokio::pin!(work);
    let result = loop {
        tokio::select! {
            Some(line) = lines.recv() => build.add(line),
            result = &mut work => break result,
        }
    };
    while let Ok(line) = lines.try_recv() {
        build.add(line);
    }
    build.progress.send_replace(match result {
        Ok(metadata) => Progress::Done(Box::new(metadata)),
        Err(e) => Progress::Failed { message: e.error.to_string(), step: Some(e.step), layer: e.layer },
    });
}
