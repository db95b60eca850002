//! Template builds: one task each, with its log.

use std::collections::HashMap;
use std::sync::Arc;

use nidus_storage::{Artifact, BuildId};
use nidus_template::{BuildLog, BuildRequest, Builder, Level, TemplateMetadata};
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
    Failed { message: String, step: Option<String> },
}

/// A build and what it said so far.
pub(crate) struct Build {
    pub progress: watch::Sender<Progress>,
    pub log: Mutex<Vec<BuildLog>>,
    cancel: CancellationToken,
    released: watch::Sender<bool>,
}

/// All builds of a node. They run one at a time: each needs a processor for itself.
pub(crate) struct Builds {
    builder: Arc<Builder>,
    store: Arc<nidus_storage::Builds>,
    all: Mutex<HashMap<BuildId, Arc<Build>>>,
    turn: Arc<Semaphore>,
}

impl Builds {
    pub fn new(builder: Arc<Builder>, store: Arc<nidus_storage::Builds>) -> Self {
        Self { builder, store, all: Default::default(), turn: Arc::new(Semaphore::new(1)) }
    }

    /// Starts a build; `None` when there is one of this id.
    pub fn start(&self, request: BuildRequest) -> Option<()> {
        let id = request.build_id;
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
        let (builder, turn) = (self.builder.clone(), self.turn.clone());
        tokio::spawn(async move {
            run(&builder, &turn, &build, request).await;
            build.released.send_replace(true);
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
            Level::Debug => tracing::debug!(target: "nidus::build", step = line.step, "{}", line.message),
            Level::Info => tracing::info!(target: "nidus::build", step = line.step, "{}", line.message),
            _ => tracing::warn!(target: "nidus::build", step = line.step, "{}", line.message),
        }
        let mut log = self.log.lock();
        if log.len() < MAX_LINES {
            log.push(line);
        }
    }
}

async fn run(builder: &Builder, turn: &Semaphore, build: &Build, request: BuildRequest) {
    let turn = tokio::select! {
        () = build.cancel.cancelled() => None,
        turn = turn.acquire() => turn.ok(),
    };
    if turn.is_none() {
        build
            .progress
            .send_replace(Progress::Failed { message: "the build was cancelled".into(), step: None });
        return;
    }
    let (sender, mut lines) = mpsc::unbounded_channel();
    let work = builder.build(request, sender, build.cancel.clone());
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
        Err(e) => {
            // The step that was at work when it failed is the one before the failure's own line.
            let step =
                build.log.lock().iter().rev().find(|l| l.level != Level::Error).map(|l| l.step.to_owned());
            Progress::Failed { message: e.to_string(), step }
        }
    });
}
