//! Watches as streams, and watches that keep their events until they are fetched.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures::{Stream, stream};
use nidus_envd_protocol::connect::{Code, ConnectError};
use nidus_envd_protocol::filesystem::watch_dir_response::{Event, KeepAlive, StartEvent};
use nidus_envd_protocol::filesystem::{FilesystemEvent, WatchDirResponse};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep};

use super::failed;
use super::watch::Watch;
use crate::rpc::{Caller, too_late};

/// Events that wait to be fetched; the oldest go first.
const MAX_EVENTS: usize = 10_000;
/// Watchers at once.
const MAX_WATCHERS: usize = 256;

struct Watcher {
    events: Arc<Mutex<Result<VecDeque<FilesystemEvent>, ConnectError>>>,
    task: AbortHandle,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Watchers by id.
#[derive(Default)]
pub struct Watchers {
    all: Mutex<HashMap<String, Watcher>>,
    next: AtomicU64,
}

fn unknown(id: &str) -> ConnectError {
    failed(Code::NotFound, format!("watcher with id {id} not found"))
}

impl Watchers {
    /// Keeps a watch's events from now on.
    pub fn add(&self, mut watch: Watch) -> Result<String, ConnectError> {
        let mut all = self.all.lock();
        if all.len() >= MAX_WATCHERS {
            return Err(failed(
                Code::ResourceExhausted,
                format!("there are {MAX_WATCHERS} watchers already"),
            ));
        }
        let id = format!("w{}", self.next.fetch_add(1, Relaxed));
        let events = Arc::new(Mutex::new(Ok(VecDeque::new())));
        let kept = events.clone();
        let task = tokio::spawn(async move {
            loop {
                let more = watch.next().await;
                let mut kept = kept.lock();
                match (&mut *kept, more) {
                    (Ok(queue), Ok(more)) => {
                        queue.extend(more);
                        while queue.len() > MAX_EVENTS {
                            queue.pop_front();
                        }
                    }
                    (kept, Err(e)) => {
                        *kept = Err(e);
                        return;
                    }
                    (Err(_), _) => return,
                }
            }
        });
        all.insert(id.clone(), Watcher { events, task: task.abort_handle() });
        Ok(id)
    }

    /// What happened since the last time.
    pub fn take(&self, id: &str) -> Result<Vec<FilesystemEvent>, ConnectError> {
        let all = self.all.lock();
        let mut events = all.get(id).ok_or_else(|| unknown(id))?.events.lock();
        match &mut *events {
            Ok(queue) => Ok(std::mem::take(queue).into()),
            Err(e) => Err(e.clone()),
        }
    }

    /// Ends it.
    pub fn remove(&self, id: &str) -> Result<(), ConnectError> {
        self.all.lock().remove(id).map(drop).ok_or_else(|| unknown(id))
    }
}

struct Events {
    watch: Watch,
    queue: VecDeque<Event>,
    deadline: Option<Instant>,
    keepalive: Duration,
    timer: Pin<Box<Sleep>>,
    over: bool,
}

/// The events of `WatchDir`.
pub fn stream(
    watch: Watch,
    caller: &Caller,
) -> impl Stream<Item = Result<WatchDirResponse, ConnectError>> + Send + use<> {
    let state = Events {
        watch,
        queue: VecDeque::from([Event::Start(StartEvent {})]),
        deadline: caller.deadline,
        keepalive: caller.keepalive,
        timer: Box::pin(tokio::time::sleep(caller.keepalive)),
        over: false,
    };
    stream::unfold(state, |mut state| async move {
        if state.over {
            return None;
        }
        let event = state.next().await;
        state.over = event.is_err();
        Some((event.map(|event| WatchDirResponse { event: Some(event) }), state))
    })
}

impl Events {
    async fn next(&mut self) -> Result<Event, ConnectError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(event);
            }
            let deadline = async {
                match self.deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = deadline => return Err(too_late()),
                more = self.watch.next() => self.queue.extend(more?.into_iter().map(Event::Filesystem)),
                () = &mut self.timer => {
                    self.timer.as_mut().reset(Instant::now() + self.keepalive);
                    return Ok(Event::Keepalive(KeepAlive {}));
                }
            }
        }
    }
}
