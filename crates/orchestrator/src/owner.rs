//! The owner task of a sandbox, from creation to release.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use nidus_proxy::Route;
use nidus_sandbox::{CreateError, Sandbox, SandboxSpec};
use nidus_telemetry::{Event, EventKind};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::node::{EgressRequest, Entry, Node, SaveRequest, State, Then};

/// The wall clock may be set: a far end time is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How long a sandbox that is to be paused at its end outlives it when nobody does.
const PAUSE_GRACE: TimeDelta = TimeDelta::minutes(5);

/// What a sandbox's owner is asked while it runs.
pub(crate) struct Asked {
    pub saves: mpsc::Receiver<SaveRequest>,
    pub updates: mpsc::Receiver<EgressRequest>,
}

/// Why a start failed.
pub(crate) enum StartError {
    /// Too many others were starting.
    Busy,
    Create(CreateError),
}

/// Creates the sandbox, tells `started` whether it was booted, keeps it until its end, releases it.
pub(crate) async fn own(
    node: Arc<Node>,
    entry: Arc<Entry>,
    spec: SandboxSpec,
    mut asked: Asked,
    started: oneshot::Sender<Result<bool, StartError>>,
) {
    let id = spec.sandbox_id.clone();
    match start(&node, &entry, spec).await {
        Ok(mut sandbox) => {
            node.create_successes.fetch_add(1, Relaxed);
            let mut gone = open(&node, &entry, &sandbox);
            let kind = if entry.config.snapshot { EventKind::Resumed } else { EventKind::Created };
            emit(&node, &entry, kind, None);
            let _ = started.send(Ok(sandbox.was_booted()));
            let (kind, reason, paused) = loop {
                let end = until_end(&entry, &sandbox, &mut asked).await;
                let close = |state, gone: &CancellationToken| {
                    // From here on it is neither listed nor routed to.
                    *entry.state.lock() = state;
                    node.catalog.remove(&id);
                    gone.cancel();
                };
                let SaveRequest { spec, then, done } = match end {
                    End::Over(reason) => {
                        close(State::Ending, &gone);
                        break (EventKind::Killed, Some(reason), None);
                    }
                    End::Save(request) => request,
                    End::Update(EgressRequest { policy, config, done }) => {
                        let result = sandbox.update_egress(policy).await;
                        if result.is_ok() {
                            *entry.egress.lock() = Some(*config);
                            emit(&node, &entry, EventKind::Updated, None);
                        }
                        let _ = done.send(result);
                        continue;
                    }
                };
                let result = match then {
                    Then::End => {
                        close(State::Pausing, &gone);
                        sandbox.pause(&spec).await
                    }
                    Then::RunOn => sandbox.checkpoint(&spec).await,
                };
                match &result {
                    Ok(saved) => tracing::info!(
                        sandbox = %id, build = %saved.metadata.build_id, ?then,
                        stop_time = ?saved.stop_time, store_time = ?saved.store_time,
                        memory_bytes = saved.memory_bytes, disk_bytes = saved.disk_bytes, "stored"
                    ),
                    Err(e) => tracing::warn!(sandbox = %id, ?then, "could not be stored: {e}"),
                }
                match (then, result) {
                    (Then::End, Ok(saved)) => break (EventKind::Paused, None, Some((done, saved))),
                    (_, Err(e)) if !e.runs_on() => {
                        close(State::Ending, &gone);
                        let reason = e.to_string();
                        let _ = done.send(Err(e));
                        break (EventKind::Killed, Some(reason), None);
                    }
                    (Then::End, Err(e)) => {
                        gone = open(&node, &entry, &sandbox);
                        let _ = done.send(Err(e));
                    }
                    (Then::RunOn, result) => {
                        *entry.state.lock() = State::Running;
                        if result.is_ok() {
                            emit(&node, &entry, EventKind::Checkpointed, None);
                        }
                        let _ = done.send(result);
                    }
                }
            };
            *entry.state.lock() = if paused.is_some() { State::Paused } else { State::Ending };
            let result = sandbox.kill().await;
            emit(&node, &entry, kind, reason);
            if let Err(e) = result {
                tracing::warn!(sandbox = %id, "while it was released: {e}");
                emit(&node, &entry, EventKind::Failed, Some(e.to_string()));
            }
            // First out of the map, then the answer: it may be resumed at once.
            release(&node, &entry, &id);
            if let Some((done, paused)) = paused {
                let _ = done.send(Ok(paused));
            }
        }
        Err(e) => {
            node.create_fails.fetch_add(1, Relaxed);
            if let StartError::Create(e) = &e {
                tracing::warn!(sandbox = %id, "could not be created: {e}");
                emit(&node, &entry, EventKind::Failed, Some(e.to_string()));
            }
            // First out of the map, then the answer: a caller that tries again at once may.
            release(&node, &entry, &id);
            let _ = started.send(Err(e));
        }
    }
}

/// Routes to a sandbox that answers and lists it; cancelling the result cuts its connections.
fn open(node: &Node, entry: &Entry, sandbox: &Sandbox) -> CancellationToken {
    let gone = CancellationToken::new();
    let ingress = entry.config.network.as_ref().and_then(|n| n.ingress.as_ref());
    node.catalog.insert(
        sandbox.id().to_owned(),
        Route {
            host_ip: sandbox.host_ip(),
            traffic_access_token: ingress.and_then(|i| i.traffic_access_token.clone()),
            mask_request_host: ingress.and_then(|i| i.mask_request_host.clone()),
            https_ports: ingress
                .map(|i| i.https_ports.iter().filter_map(|p| u16::try_from(*p).ok()).collect())
                .unwrap_or_default(),
            gone: gone.clone(),
        },
    );
    let _ = entry.host_ip.set(sandbox.host_ip());
    *entry.state.lock() = State::Running;
    gone
}

fn release(node: &Node, entry: &Entry, id: &str) {
    node.sandboxes.lock().remove(id);
    entry.released.send_replace(true);
}

async fn start(node: &Node, entry: &Entry, spec: SandboxSpec) -> Result<Sandbox, StartError> {
    node.starting_count.fetch_add(1, Relaxed);
    let result = async {
        let turn = tokio::time::timeout(node.config.start_limit, node.starting.acquire());
        let _turn = tokio::select! {
            () = entry.kill.cancelled() => return Err(StartError::Create(CreateError::Cancelled)),
            turn = turn => turn.map_err(|_| StartError::Busy)?.map_err(|_| StartError::Busy)?,
        };
        node.factory.create(spec, entry.kill.clone()).await.map_err(StartError::Create)
    }
    .await;
    node.starting_count.fetch_sub(1, Relaxed);
    result
}

/// What a sandbox's owner has to do.
enum End {
    /// It is to be released, and why.
    Over(String),
    /// It is to be stored, and ends or runs on.
    Save(SaveRequest),
    /// Its network is to be another.
    Update(EgressRequest),
}

/// Waits for the first reason to end or to store it, and says which.
async fn until_end(entry: &Entry, sandbox: &Sandbox, asked: &mut Asked) -> End {
    let mut end = entry.end.subscribe();
    let failed = sandbox.failed();
    tokio::pin!(failed);
    loop {
        // One that is to be paused at its end waits a while for the API, which keeps what is paused.
        let grace = if entry.config.auto_pause { PAUSE_GRACE } else { TimeDelta::zero() };
        let left = (*end.borrow_and_update() + grace - Utc::now()).to_std().unwrap_or_default();
        if left.is_zero() {
            return End::Over("its time is over".to_owned());
        }
        tokio::select! {
            biased;
            () = entry.kill.cancelled() => {
                return End::Over(entry.reason.lock().clone().unwrap_or_else(|| "killed".to_owned()));
            }
            reason = &mut failed => return End::Over(reason),
            Some(request) = asked.updates.recv() => return End::Update(request),
            Some(request) = asked.saves.recv() => return End::Save(request),
            _ = end.changed() => {}
            () = tokio::time::sleep(left.min(LOOK_AGAIN)) => {}
        }
    }
}

pub(crate) fn emit(node: &Node, entry: &Entry, kind: EventKind, reason: Option<String>) {
    let c = &entry.config;
    node.events.emit(&Event {
        timestamp: Utc::now(),
        kind,
        sandbox_id: c.sandbox_id.clone(),
        execution_id: c.execution_id.clone(),
        template_id: c.template_id.clone(),
        build_id: c.build_id.clone(),
        team_id: c.team_id.clone(),
        reason,
    });
}
