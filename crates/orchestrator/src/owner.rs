//! The owner task of a sandbox, from creation to release.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use chrono::Utc;
use nidus_proxy::Route;
use nidus_sandbox::{CreateError, Sandbox, SandboxSpec};
use nidus_telemetry::{Event, EventKind};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::node::{Entry, Node};

/// The wall clock may be set: a far end time is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Why a start failed.
pub(crate) enum StartError {
    /// Too many others were starting.
    Busy,
    Create(CreateError),
}

/// Creates the sandbox, tells `started`, keeps it until its end, releases it.
pub(crate) async fn own(
    node: Arc<Node>,
    entry: Arc<Entry>,
    spec: SandboxSpec,
    started: oneshot::Sender<Result<(), StartError>>,
) {
    let id = spec.sandbox_id.clone();
    match start(&node, &entry, spec).await {
        Ok(sandbox) => {
            node.create_successes.fetch_add(1, Relaxed);
            let gone = CancellationToken::new();
            let ingress = entry.config.network.as_ref().and_then(|n| n.ingress.as_ref());
            node.catalog.insert(
                id.clone(),
                Route {
                    host_ip: sandbox.host_ip(),
                    traffic_access_token: ingress.and_then(|i| i.traffic_access_token.clone()),
                    mask_request_host: ingress.and_then(|i| i.mask_request_host.clone()),
                    gone: gone.clone(),
                },
            );
            entry.running.store(true, Relaxed);
            emit(&node, &entry, EventKind::Created, None);
            let _ = started.send(Ok(()));
            let reason = until_end(&entry, &sandbox).await;
            // From here on it is neither listed nor routed to, whatever ended it.
            entry.running.store(false, Relaxed);
            node.catalog.remove(&id);
            gone.cancel();
            let result = sandbox.kill().await;
            emit(&node, &entry, EventKind::Killed, Some(reason));
            if let Err(e) = result {
                tracing::warn!(sandbox = %id, "while it was released: {e}");
                emit(&node, &entry, EventKind::Failed, Some(e.to_string()));
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
            return;
        }
    }
    release(&node, &entry, &id);
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

/// Waits for the first reason to end it, and says which.
async fn until_end(entry: &Entry, sandbox: &Sandbox) -> String {
    let mut end = entry.end.subscribe();
    let failed = sandbox.failed();
    tokio::pin!(failed);
    loop {
        let left = (*end.borrow_and_update() - Utc::now()).to_std().unwrap_or_default();
        if left.is_zero() {
            return "its time is over".to_owned();
        }
        tokio::select! {
            biased;
            () = entry.kill.cancelled() => {
                return entry.reason.lock().clone().unwrap_or_else(|| "killed".to_owned());
            }
            reason = &mut failed => return reason,
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
