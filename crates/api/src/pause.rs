//! Pause and resume. What is paused is known here, what runs is known by the node.
//!
//! Changes of one sandbox's state happen one after another ([`Turns`]), so each has one outcome: a
//! connect during a pause waits for its end and resumes, a second pause or resume finds what the
//! first has made of it, and a kill removes whatever there is then. They go to their end when
//! the client goes away.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use axum::Json;
use axum::extract::{Path, State};
use chrono::TimeDelta;
use http::StatusCode;
use nidus_proto::node::{
    RunningSandbox, SandboxDeleteRequest, SandboxPauseRequest, TemplateBuildDeleteRequest,
};
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tonic::Code;
use uuid::Uuid;

use crate::auth::Team;
use crate::input::{Input, OptionalInput};
use crate::list;
use crate::model::{ConnectRequest, OldConnectRequest, PauseRequest, ResumeRequest, Sandbox};
use crate::sandboxes::{extend, not_found, shown, time, timestamp};
use crate::store::SnapshotRow;
use crate::{Api, ApiError, expiry};

type Shared = State<Arc<Api>>;

/// One change of a sandbox's state at a time.
#[derive(Debug, Default)]
pub struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

/// More entries than this are looked through for those that nobody uses.
const MANY_TURNS: usize = 256;

impl Turns {
    /// Waits for the sandbox's turn and takes it until the result is dropped.
    pub async fn take(&self, id: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock();
            if turns.len() > MANY_TURNS {
                turns.retain(|_, turn| turn.strong_count() > 0);
            }
            let known = turns.get(id).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let turn = Arc::new(tokio::sync::Mutex::new(()));
                turns.insert(id.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

/// Runs a change to its end, whether its client waits for it or not.
pub async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let lost =
        |e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the change did not finish: {e}"));
    tokio::spawn(change).await.unwrap_or_else(|e| Err(lost(e)))
}

pub fn conflict(text: String) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, text)
}

impl Api {
    /// What a paused sandbox of this team is resumed from.
    pub(crate) async fn paused(&self, team: &Team, id: &str) -> Result<Option<SnapshotRow>, ApiError> {
        Ok(self.store.snapshots_of(&team.id, id).await?.into_iter().find(|s| s.paused))
    }

    async fn pause(&self, team: &Team, id: &str, filesystem_only: bool) -> Result<(), ApiError> {
        let Some(s) = self.running(team, id).await? else {
            return Err(match self.paused(team, id).await? {
                Some(_) => conflict(format!("Sandbox \"{}\" is already paused", shown(id))),
                None => not_found(id),
            });
        };
        let mut config = s.config.clone().unwrap_or_default();
        config.build_id = Uuid::new_v4().to_string();
        config.snapshot = true;
        // The build has them.
        config.env_vars.clear();
        // Noted first: if the daemon ends meanwhile, its next start finds out what became of it.
        self.store.begin_pause(&config, time(s.start_time), filesystem_only).await?;
        let request = SandboxPauseRequest {
            sandbox_id: id.to_owned(),
            template_id: config.template_id.clone(),
            build_id: config.build_id.clone(),
            filesystem_only,
        };
        if let Err(s) = self.nodes.sandboxes().pause(request).await {
            // A node that cannot be asked may have paused it all the same.
            if s.code() != Code::Unavailable || !self.node_has(&config.template_id, &config.build_id).await? {
                self.store.forget_snapshot(&config.build_id).await?;
                return Err(if s.code() == Code::NotFound { not_found(id) } else { s.into() });
            }
        }
        self.store.finish_pause(&config.build_id).await?;
        // Earlier pauses of it that nothing reads any more.
        for old in self.store.snapshots_of(&team.id, id).await?.iter().skip(1) {
            self.delete_snapshot(old).await?;
        }
        // It may have been the last that ran from a checkpoint.
        self.sweep().await;
        Ok(())
    }

    /// Pauses it unless its end was moved on meanwhile.
    pub(crate) async fn pause_when_due(&self, team: &Team, id: &str) -> Result<(), ApiError> {
        let _turn = self.turns.take(id).await;
        match self.running(team, id).await? {
            Some(s) if expiry::is_due(&s) => {
                let disk_only = s.config.as_ref().is_some_and(|c| c.auto_pause_filesystem_only);
                self.pause(team, id, disk_only).await
            }
            _ => Ok(()),
        }
    }

    /// Whether it is gone: a build that others read stays, and what it was is remembered.
    async fn delete_snapshot(&self, s: &SnapshotRow) -> Result<bool, ApiError> {
        let request = TemplateBuildDeleteRequest {
            build_id: s.build_id.clone(),
            template_id: s.config.template_id.clone(),
        };
        match self.nodes.templates().template_build_delete(request).await {
            Ok(_) => {}
            Err(e) if e.code() == Code::NotFound => {}
            Err(e) if e.code() == Code::FailedPrecondition => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        self.store.forget_snapshot(&s.build_id).await?;
        Ok(true)
    }

    /// Resumes it. With `reboot`, its memory is to be left out.
    pub(crate) async fn resume(
        &self,
        team: &Team,
        id: &str,
        length: TimeDelta,
        auto_pause: Option<bool>,
        reboot: bool,
    ) -> Result<Sandbox, ApiError> {
        let Some(paused) = self.paused(team, id).await? else { return Err(not_found(id)) };
        let mut config = paused.config;
        config.execution_id = Uuid::new_v4().to_string();
        config.auto_pause = auto_pause.unwrap_or(config.auto_pause);
        self.start_sandbox(config, length, reboot).await
    }

    /// Ends one that runs, for this reason; false when it does not run.
    pub(crate) async fn end(&self, id: &str, reason: &str) -> Result<bool, ApiError> {
        let request =
            SandboxDeleteRequest { sandbox_id: id.to_owned(), kill_reason: Some(reason.to_owned()) };
        match self.nodes.sandboxes().delete(request).await {
            Ok(_) => Ok(true),
            Err(s) if s.code() == Code::NotFound => Ok(false),
            Err(s) => Err(s.into()),
        }
    }

    /// Ends it if it runs, and deletes its pauses.
    async fn remove(&self, team: &Team, id: &str) -> Result<(), ApiError> {
        let mut found = false;
        if self.running(team, id).await?.is_some() {
            found = self.end(id, "killed by request").await?;
        }
        // The newest first: it reads the older ones.
        for s in self.store.snapshots_of(&team.id, id).await? {
            found |= s.paused;
            if !self.delete_snapshot(&s).await? {
                // Forks of it or snapshots read it.
                self.store.note_checkpoint(&s.build_id, &s.config.template_id).await?;
                self.store.forget_snapshot(&s.build_id).await?;
            }
        }
        self.sweep().await;
        if found { Ok(()) } else { Err(not_found(id)) }
    }

    /// Extends a running one, whatever `reboot` says; resumes a paused one.
    async fn connect(
        &self,
        team: &Team,
        id: &str,
        length: TimeDelta,
        reboot: bool,
    ) -> Result<(StatusCode, Sandbox), ApiError> {
        if let Some(s) = self.running(team, id).await? {
            match extend(self, &s, length).await {
                Ok(()) => return Ok((StatusCode::OK, self.answer(&s))),
                // It ended just now; it may have been paused before.
                Err(e) if e.status == StatusCode::NOT_FOUND => {}
                Err(e) => return Err(e),
            }
        }
        // A client that says 0 wants to look at what runs; what is resumed must live a while.
        let length = if length.is_zero() { self.default_length() } else { length };
        Ok((StatusCode::CREATED, self.resume(team, id, length, None, reboot).await?))
    }

    pub(crate) fn default_length(&self) -> TimeDelta {
        TimeDelta::from_std(self.config.default_timeout).unwrap_or(TimeDelta::MAX)
    }

    /// Finds out what became of pauses that were under way when the daemon ended; what became of
    /// checkpoints is nobody's, and goes.
    pub(crate) async fn recover_pauses(&self) -> Result<(), ApiError> {
        for s in self.store.interrupted_pauses().await? {
            if self.node_has(&s.config.template_id, &s.build_id).await? {
                self.store.finish_pause(&s.build_id).await?;
                tracing::info!(
                    sandbox = s.sandbox_id,
                    "the daemon ended while this sandbox was paused: it is stored and can be resumed"
                );
                continue;
            }
            self.store.forget_snapshot(&s.build_id).await?;
            let outcome = match self.store.newest_snapshot(&s.sandbox_id).await? {
                Some(_) => "what it did since its last pause is lost",
                None => "it is lost",
            };
            tracing::warn!(
                sandbox = s.sandbox_id,
                "the daemon ended while this sandbox was paused: {outcome}"
            );
        }
        self.sweep().await;
        Ok(())
    }
}

/// A paused sandbox in the form of a running one, as lists have it.
pub fn as_listed(s: &SnapshotRow) -> RunningSandbox {
    RunningSandbox {
        sandbox_id: s.sandbox_id.clone(),
        config: Some(s.config.clone()),
        start_time: Some(timestamp(s.started_at)),
        end_time: Some(timestamp(s.paused_at)),
        ..RunningSandbox::default()
    }
}

pub async fn pause(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<PauseRequest>,
) -> Result<StatusCode, ApiError> {
    to_its_end(async move {
        let _turn = api.turns.take(&id).await;
        api.pause(&team, &id, request.memory == Some(false)).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn resume(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<ResumeRequest>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let length = request.timeout.map_or(Ok(api.default_length()), |t| api.timeout(t))?;
    if length.is_zero() {
        return Err(ApiError::bad("The timeout of a resumed sandbox is at least 1 s"));
    }
    let made = to_its_end(async move {
        let _turn = api.turns.take(&id).await;
        if api.running(&team, &id).await?.is_some() {
            return Err(conflict(format!("Sandbox \"{}\" is already running", shown(&id))));
        }
        api.resume(&team, &id, length, request.auto_pause, request.memory == Some(false)).await
    });
    Ok((StatusCode::CREATED, Json(made.await?)))
}

async fn connect_for(
    api: Arc<Api>,
    team: Team,
    id: String,
    seconds: i64,
    memory: Option<bool>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let length = api.timeout(seconds)?;
    let connected = to_its_end(async move {
        let _turn = api.turns.take(&id).await;
        api.connect(&team, &id, length, memory == Some(false)).await
    });
    let (status, sandbox) = connected.await?;
    Ok((status, Json(sandbox)))
}

pub async fn connect(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    Input(request): Input<OldConnectRequest>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    connect_for(api, team, id, request.timeout, request.memory).await
}

pub async fn connect_v2(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<ConnectRequest>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let default = api.config.default_timeout.as_secs().cast_signed();
    connect_for(api, team, id, request.timeout.unwrap_or(default), request.memory).await
}

pub async fn kill(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    to_its_end(async move {
        let _turn = api.turns.take(&id).await;
        api.remove(&team, &id).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The team's paused sandboxes, without those that run again.
pub async fn paused_of_team(
    api: &Api,
    team: &Team,
    running: &[RunningSandbox],
) -> Result<Vec<RunningSandbox>, ApiError> {
    let mut all = api.store.snapshots(&team.id).await?;
    all.retain(|s| running.iter().all(|r| list::id(r) != s.sandbox_id));
    Ok(all.iter().map(as_listed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_of_one_sandbox_come_one_after_another() {
        let turns = Arc::new(Turns::default());
        let first = turns.take("a").await;
        let second = tokio::spawn({
            let turns = turns.clone();
            async move { drop(turns.take("a").await) }
        });
        // Another sandbox does not wait, and the second of the first cannot be done.
        drop(turns.take("b").await);
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        second.await.unwrap();
        for n in 0..2 * MANY_TURNS {
            drop(turns.take(&n.to_string()).await);
        }
        assert!(turns.0.lock().len() <= MANY_TURNS + 1);
    }
}
