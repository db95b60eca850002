//! `SandboxService` of the contract.

use std::sync::{Arc, OnceLock};

use chrono::{DateTime, Utc};
use nidus_proto::node::sandbox_service_server::SandboxService;
use nidus_proto::node::*;
use nidus_sandbox::{CreateError, SandboxSpec, SaveSpec, Saved};
use nidus_storage::BuildId;
use nidus_telemetry::EventKind;
use parking_lot::Mutex;
use prost_types::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::Node;
use crate::node::{EgressRequest, Entry, SaveRequest, State, Then};
use crate::owner::{Asked, StartError, emit, own};
use crate::save;

const ID_LIMIT: usize = 64;

/// The service over a node.
pub(crate) struct Sandboxes(pub Arc<Node>);

fn bad(text: impl Into<String>) -> Status {
    Status::invalid_argument(text)
}

fn not_found(id: &str) -> Status {
    Status::not_found(format!("sandbox '{id}' was not found on this node"))
}

pub(crate) fn to_time(t: &Timestamp) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(t.seconds, u32::try_from(t.nanos).ok()?)
}

pub(crate) fn from_time(t: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: t.timestamp(), nanos: t.timestamp_subsec_nanos().cast_signed() }
}

fn check(config: &SandboxConfig) -> Result<BuildId, Status> {
    let id = &config.sandbox_id;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if id.is_empty() || id.len() > ID_LIMIT || !id.bytes().all(plain) {
        return Err(bad(format!("a sandbox id has 1 to {ID_LIMIT} lower-case letters and digits")));
    }
    config.build_id.parse().map_err(|_| bad(format!("build id '{}' is not a UUID", config.build_id)))
}

fn create_status(id: &str, e: CreateError) -> Status {
    match e {
        CreateError::TemplateNotFound(b) => {
            Status::not_found(format!("build {b} was not found on this node"))
        }
        CreateError::Template(e) => Status::failed_precondition(e.to_string()),
        e if e.is_unsupported() => Status::failed_precondition(e.to_string()),
        e if e.is_damage() => Status::data_loss(e.to_string()),
        CreateError::Cancelled => Status::cancelled(format!("sandbox '{id}' was killed while it started")),
        CreateError::ShuttingDown => Status::unavailable(e.to_string()),
        CreateError::Envd(_) => Status::deadline_exceeded(format!("sandbox '{id}': {e}")),
        e => Status::internal(format!("sandbox '{id}': {e}")),
    }
}

impl Sandboxes {
    fn entry(&self, id: &str) -> Result<Arc<Entry>, Status> {
        self.0.sandboxes.lock().get(id).cloned().ok_or_else(|| not_found(id))
    }

    /// Has its owner store it.
    async fn save(&self, id: &str, spec: SaveSpec, then: Then) -> Result<Saved, Status> {
        let entry = self.entry(id)?;
        entry.begin_save(then).map_err(|state| save::not_now(id, then, state))?;
        let (done, answer) = oneshot::channel();
        // There is room: one at a time comes this far.
        entry.saves.try_send(SaveRequest { spec, then, done }).map_err(|_| not_found(id))?;
        match answer.await {
            Ok(Ok(saved)) => Ok(saved),
            Ok(Err(e)) => Err(save::status(id, then, &e)),
            // It ended before its owner came to it.
            Err(_) => Err(not_found(id)),
        }
    }

    /// Has its owner put another egress policy in force.
    async fn update_egress(
        &self,
        entry: &Entry,
        mut config: SandboxNetworkEgressConfig,
    ) -> Result<(), Status> {
        let id = &entry.config.sandbox_id;
        let policy = self.0.network.policy(Some(&config), true).await.map_err(|e| bad(e.to_string()))?;
        config.secrets.clear();
        let (done, answer) = oneshot::channel();
        let request = EgressRequest { policy, config: Box::new(config), done };
        entry.updates.send(request).await.map_err(|_| not_found(id))?;
        match answer.await {
            Ok(done) => done.map_err(|e| Status::internal(format!("sandbox '{id}': {e}"))),
            // It ended before its owner came to it.
            Err(_) => Err(not_found(id)),
        }
    }

    fn admit(&self, entry: &Arc<Entry>) -> Result<(), Status> {
        let node = &self.0;
        if node.status() != ServiceInfoStatus::Healthy {
            return Err(Status::unavailable("this node takes no new sandboxes"));
        }
        let mut all = node.sandboxes.lock();
        if all.len() >= node.config.max_sandboxes {
            return Err(Status::resource_exhausted(format!(
                "this node runs {} sandboxes, its limit",
                node.config.max_sandboxes
            )));
        }
        let id = &entry.config.sandbox_id;
        if all.contains_key(id) {
            return Err(Status::already_exists(format!("sandbox '{id}' is already running")));
        }
        all.insert(id.clone(), entry.clone());
        Ok(())
    }
}

#[tonic::async_trait]
impl SandboxService for Sandboxes {
    async fn create(
        &self,
        request: Request<SandboxCreateRequest>,
    ) -> Result<Response<SandboxCreateResponse>, Status> {
        let request = request.into_inner();
        let mut config = request.sandbox.ok_or_else(|| bad("the request has no sandbox"))?;
        let build_id = check(&config)?;
        let start = request.start_time.as_ref().and_then(to_time).unwrap_or_else(Utc::now);
        let end =
            request.end_time.as_ref().and_then(to_time).ok_or_else(|| bad("the request has no end time"))?;
        if end <= Utc::now() {
            return Err(bad("the end time has passed"));
        }
        if config.execution_id.is_empty() {
            config.execution_id = uuid::Uuid::new_v4().to_string();
        }
        let network = self.0.network.of(&config).await?;
        // The policy has them, and nobody is told them.
        if let Some(egress) = config.network.as_mut().and_then(|n| n.egress.as_mut()) {
            egress.secrets.clear();
        }
        let spec = SandboxSpec {
            sandbox_id: config.sandbox_id.clone(),
            execution_id: config.execution_id.clone(),
            template_id: config.template_id.clone(),
            build_id,
            env_vars: config.env_vars.clone(),
            access_token: config.envd_access_token.clone(),
            network,
            snapshot: config.snapshot,
            filesystem_boot: request.filesystem_boot == Some(true),
            size: None,
        };
        let (saves, asked_saves) = mpsc::channel(1);
        let (updates, asked_updates) = mpsc::channel(8);
        let asked = Asked { saves: asked_saves, updates: asked_updates };
        let entry = Arc::new(Entry {
            config,
            start,
            end: watch::Sender::new(end),
            kill: CancellationToken::new(),
            reason: Default::default(),
            state: Mutex::new(State::Starting),
            saves,
            updates,
            host_ip: OnceLock::new(),
            egress: Mutex::default(),
            released: watch::Sender::new(false),
        });
        self.admit(&entry)?;
        let (tell, started) = oneshot::channel();
        tokio::spawn(own(self.0.clone(), entry.clone(), spec, asked, tell));
        let filesystem_boot_applied = match started.await {
            Ok(Ok(booted)) => booted,
            Ok(Err(StartError::Busy)) => {
                return Err(Status::resource_exhausted(
                    "too many sandboxes are starting on this node; try again",
                ));
            }
            Ok(Err(StartError::Create(e))) => return Err(create_status(&entry.config.sandbox_id, e)),
            Err(_) => return Err(Status::internal("the sandbox's owner ended unexpectedly")),
        };
        Ok(Response::new(SandboxCreateResponse {
            client_id: self.0.config.node_id.clone(),
            scheduling_metadata: Some(SchedulingMetadata {
                memfile_base_build_id: build_id.to_string(),
                rootfs_base_build_id: build_id.to_string(),
                build_id: build_id.to_string(),
                memfile_build_ids: vec![build_id.to_string()],
                rootfs_build_ids: vec![build_id.to_string()],
                ..Default::default()
            }),
            filesystem_boot_applied,
        }))
    }

    async fn update(&self, request: Request<SandboxUpdateRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let entry = self.entry(&request.sandbox_id)?;
        if let Some(egress) = request.egress {
            self.update_egress(&entry, egress).await?;
        }
        if let Some(end) = &request.end_time {
            let end = to_time(end).ok_or_else(|| bad("the end time is out of range"))?;
            entry.end.send_replace(end);
            emit(&self.0, &entry, EventKind::Updated, None);
        }
        Ok(Response::new(()))
    }

    async fn list(&self, _: Request<()>) -> Result<Response<SandboxListResponse>, Status> {
        let entries: Vec<Arc<Entry>> = self.0.sandboxes.lock().values().cloned().collect();
        let listed = entries.iter().filter(|e| e.is_running());
        let sandboxes = listed
            .map(|e| RunningSandbox {
                client_id: self.0.config.node_id.clone(),
                start_time: Some(from_time(e.start)),
                end_time: Some(from_time(*e.end.borrow())),
                sandbox_id: e.config.sandbox_id.clone(),
                team_id: e.config.team_id.clone(),
                execution_id: e.config.execution_id.clone(),
                vcpu: e.config.vcpu,
                ram_mb: e.config.ram_mb,
                config: Some(e.current_config()),
            })
            .collect();
        Ok(Response::new(SandboxListResponse { sandboxes }))
    }

    async fn delete(&self, request: Request<SandboxDeleteRequest>) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let entry = self.entry(&request.sandbox_id)?;
        let first = !entry.kill.is_cancelled();
        entry.ask_to_end(request.kill_reason.as_deref().unwrap_or("killed"));
        entry.gone().await;
        // A pause under way goes to its end; what was paused is not here to be killed any more.
        let killed = first && *entry.state.lock() != State::Paused;
        if killed { Ok(Response::new(())) } else { Err(not_found(&request.sandbox_id)) }
    }

    async fn pause(
        &self,
        request: Request<SandboxPauseRequest>,
    ) -> Result<Response<SandboxPauseResponse>, Status> {
        let request = request.into_inner();
        let spec = save::spec(&request.build_id, &request.template_id, request.filesystem_only)?;
        let saved = self.save(&request.sandbox_id, spec, Then::End).await?;
        let scheduling_metadata = Some(save::scheduling(&saved));
        Ok(Response::new(SandboxPauseResponse { scheduling_metadata }))
    }

    async fn checkpoint(
        &self,
        request: Request<SandboxCheckpointRequest>,
    ) -> Result<Response<SandboxCheckpointResponse>, Status> {
        let request = request.into_inner();
        let id = &request.sandbox_id;
        let template = &self.entry(id)?.config.template_id;
        let spec = save::spec(&request.build_id, template, request.filesystem_only)?;
        let saved = self.save(id, spec, Then::RunOn).await?;
        let scheduling_metadata = Some(save::scheduling(&saved));
        Ok(Response::new(SandboxCheckpointResponse { scheduling_metadata }))
    }

    async fn list_cached_builds(
        &self,
        _: Request<()>,
    ) -> Result<Response<SandboxListCachedBuildsResponse>, Status> {
        let builds = self.0.factory.cached().into_iter().map(|(build, until)| CachedBuildInfo {
            build_id: build.to_string(),
            expiration_time: Some(from_time(until)),
        });
        let builds = builds.collect();
        Ok(Response::new(SandboxListCachedBuildsResponse { builds }))
    }
}
