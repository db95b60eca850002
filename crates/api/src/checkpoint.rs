//! Checkpoints of running sandboxes, kept as snapshots or for forks, and the end of builds that
//! nobody has any more.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use chrono::TimeDelta;
use http::StatusCode;
use nidus_proto::node::{
    RunningSandbox, SandboxCheckpointRequest, SandboxConfig, TemplateBuildDeleteRequest,
};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use crate::auth::Team;
use crate::input::OptionalInput;
use crate::model::{ForkRequest, ForkResult, SnapshotInfo, SnapshotRequest};
use crate::pause::{conflict, to_its_end};
use crate::sandboxes::{new_sandbox_id, not_found, secret, shown};
use crate::store::{SnapshotFilter, TemplateRow};
use crate::tags::split;
use crate::templates::check_name;
use crate::{Api, ApiError};

type Shared = State<Arc<Api>>;

/// Between two looks for builds that nobody needs any more.
pub const SWEEP: Duration = Duration::from_secs(60);
/// The SDKs ask for no more children of a sandbox at once.
const MAX_FORKS: i64 = 20;
const MAX_LISTED: i64 = 100;

/// Builds that are in hand: made, but not yet kept or run from.
#[derive(Debug, Default)]
pub struct InHand(Mutex<HashSet<String>>);

/// A build that was made of a running sandbox, and with what a sandbox is resumed from it.
struct Checkpoint {
    api: Arc<Api>,
    config: SandboxConfig,
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        self.api.in_hand.0.lock().remove(&self.config.build_id);
    }
}

impl Api {
    async fn checkpoint(
        self: &Arc<Self>,
        s: &RunningSandbox,
        filesystem_only: bool,
    ) -> Result<Checkpoint, ApiError> {
        let mut config = s.config.clone().unwrap_or_default();
        config.build_id = Uuid::new_v4().to_string();
        config.snapshot = true;
        // The build has them.
        config.env_vars.clear();
        let request = SandboxCheckpointRequest {
            sandbox_id: config.sandbox_id.clone(),
            build_id: config.build_id.clone(),
            filesystem_only,
            ..Default::default()
        };
        self.in_hand.0.lock().insert(config.build_id.clone());
        let checkpoint = Checkpoint { api: self.clone(), config };
        let config = &checkpoint.config;
        // Noted first: if the daemon ends meanwhile, its next start removes what there is.
        self.store.note_checkpoint(&config.build_id, &config.template_id).await?;
        if let Err(s) = self.nodes.sandboxes().checkpoint(request).await {
            if let Err(e) = self.end_build(&config.build_id, &config.template_id).await {
                tracing::warn!("what there is of a failed checkpoint stays for now: {e}");
            }
            return Err(if s.code() == Code::NotFound { not_found(&config.sandbox_id) } else { s.into() });
        }
        Ok(checkpoint)
    }

    /// The sandbox, if it runs.
    async fn to_checkpoint(&self, team: &Team, id: &str) -> Result<RunningSandbox, ApiError> {
        if let Some(s) = self.running(team, id).await? {
            return Ok(s);
        }
        Err(match self.paused(team, id).await? {
            Some(_) => conflict(format!("Sandbox \"{}\" is paused: resume it first", shown(id))),
            None => not_found(id),
        })
    }

    async fn snapshot(
        self: &Arc<Self>,
        team: &Team,
        id: &str,
        name: Option<&str>,
        filesystem_only: bool,
    ) -> Result<TemplateRow, ApiError> {
        let _turn = self.turns.take(id).await;
        let s = self.to_checkpoint(team, id).await?;
        let checkpoint = self.checkpoint(&s, filesystem_only).await?;
        let config = &checkpoint.config;
        match self.store.keep_checkpoint(name, config).await? {
            Some(kept) => {
                self.built.notify_one();
                Ok(kept)
            }
            None => {
                self.end_build(&config.build_id, &config.template_id).await?;
                let name = name.unwrap_or_default();
                Err(conflict(format!("The name '{name}' is taken by a template")))
            }
        }
    }

    /// Sandboxes that go on from where this one is, each with an id and secrets of its own.
    async fn fork(
        self: &Arc<Self>,
        team: &Team,
        id: &str,
        count: i64,
        length: TimeDelta,
    ) -> Result<Vec<ForkResult>, ApiError> {
        let checkpoint = {
            let _turn = self.turns.take(id).await;
            let s = self.to_checkpoint(team, id).await?;
            self.checkpoint(&s, false).await?
        };
        let mut starting = JoinSet::new();
        for _ in 0..count {
            let child = child_of(&checkpoint.config)?;
            let api = self.clone();
            starting.spawn(async move { api.start_sandbox(child, length, false).await });
        }
        let mut results = Vec::new();
        while let Some(done) = starting.join_next().await {
            results.push(match done {
                Ok(Ok(sandbox)) => ForkResult { sandbox: Some(sandbox), error: None },
                Ok(Err(e)) => ForkResult { sandbox: None, error: Some(e.body()) },
                Err(e) => {
                    let e = format!("its start did not finish: {e}");
                    let e = ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, e);
                    ForkResult { sandbox: None, error: Some(e.body()) }
                }
            });
        }
        drop(checkpoint);
        if results.iter().all(|r| r.sandbox.is_none()) {
            self.sweep().await;
        }
        Ok(results)
    }

    /// Deletes the builds that nobody has and nobody needs any more.
    pub(crate) async fn sweep(&self) {
        // One that is deleted may have been the last that read another.
        while self.sweep_once().await.unwrap_or_else(|e| {
            tracing::warn!("builds that nobody has stay for now: {e}");
            false
        }) {}
    }

    /// Whether any could be deleted.
    async fn sweep_once(&self) -> Result<bool, ApiError> {
        let mut any = false;
        for (build, template) in self.store.checkpoints().await? {
            if !self.in_hand.0.lock().contains(&build) {
                any |= self.end_build(&build, &template).await?;
            }
        }
        Ok(any)
    }

    /// Deletes a noted build. One that somebody needs is left for later.
    async fn end_build(&self, build: &str, template: &str) -> Result<bool, ApiError> {
        let request =
            TemplateBuildDeleteRequest { build_id: build.to_owned(), template_id: template.to_owned() };
        match self.nodes.templates().template_build_delete(request).await {
            Ok(_) => {}
            Err(s) if s.code() == Code::NotFound => {}
            Err(s) if s.code() == Code::FailedPrecondition => return Ok(false),
            Err(s) => return Err(s.into()),
        }
        self.store.forget_checkpoint(build).await?;
        Ok(true)
    }
}

/// Another sandbox with the same settings. Those who know its parent's secrets do not know its own.
fn child_of(parent: &SandboxConfig) -> Result<SandboxConfig, ApiError> {
    let mut child = parent.clone();
    child.sandbox_id = new_sandbox_id()?;
    child.execution_id = Uuid::new_v4().to_string();
    let traffic = child.network.as_mut().and_then(|n| n.ingress.as_mut());
    let traffic = traffic.and_then(|i| i.traffic_access_token.as_mut());
    for token in child.envd_access_token.as_mut().into_iter().chain(traffic) {
        *token = secret()?;
    }
    Ok(child)
}

/// As E2B names a snapshot: by name if it has one, and with the tag that all builds have.
fn info(t: &TemplateRow) -> SnapshotInfo {
    let names: Vec<String> = t.aliases.iter().map(|a| format!("{a}:default")).collect();
    let snapshot_id = names.first().cloned().unwrap_or_else(|| format!("{}:default", t.id));
    SnapshotInfo { snapshot_id, names }
}

pub async fn snapshot(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<SnapshotRequest>,
) -> Result<(StatusCode, Json<SnapshotInfo>), ApiError> {
    let filesystem_only = request.memory == Some(false);
    let name = request.name.filter(|n| !n.is_empty()).map(|n| split(&n).0.to_owned());
    if let Some(name) = &name {
        check_name(name)?;
    }
    let made =
        to_its_end(async move { api.snapshot(&team, &id, name.as_deref(), filesystem_only).await }).await?;
    Ok((StatusCode::CREATED, Json(info(&made))))
}

pub async fn fork(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    OptionalInput(request): OptionalInput<ForkRequest>,
) -> Result<(StatusCode, Json<Vec<ForkResult>>), ApiError> {
    let length = request.timeout.map_or(Ok(api.default_length()), |t| api.timeout(t))?;
    let count = request.count.unwrap_or(1);
    if length.is_zero() {
        return Err(ApiError::bad("The timeout of a forked sandbox is at least 1 s"));
    }
    if !(1..=MAX_FORKS).contains(&count) {
        return Err(ApiError::bad(format!("count {count} is not a number from 1 to {MAX_FORKS}")));
    }
    let made = to_its_end(async move { api.fork(&team, &id, count, length).await }).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

fn filter(query: &str) -> Result<SnapshotFilter, ApiError> {
    let mut filter = SnapshotFilter { limit: MAX_LISTED, ..Default::default() };
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let bad = |what: &str| ApiError::bad(format!("{name} '{}' is not {what}", value.escape_debug()));
        match name.as_ref() {
            "sandboxID" => filter.sandbox = Some(value.into_owned()),
            "name" if !value.is_empty() => filter.name = Some(split(&value).0.to_owned()),
            "limit" => {
                let limit = value.parse().ok().filter(|l: &i64| *l > 0);
                filter.limit = limit.ok_or_else(|| bad("a number from 1 to 100"))?.min(MAX_LISTED);
            }
            "nextToken" if !value.is_empty() => {
                filter.before = Some(value.parse().map_err(|_| bad("a token of this list"))?);
            }
            _ => {}
        }
    }
    Ok(filter)
}

pub async fn list(State(api): Shared, team: Team, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let mut filter = filter(query.as_deref().unwrap_or_default())?;
    let limit = usize::try_from(filter.limit).unwrap_or_default();
    filter.limit += 1;
    let mut all = api.store.snapshot_templates(&team.id, &filter).await?;
    let more = all.len() > limit;
    all.truncate(limit);
    let mut response = Json(all.iter().map(info).collect::<Vec<_>>()).into_response();
    if let (true, Some(last)) = (more, all.last()) {
        response.headers_mut().insert("x-next-token", last.number.into());
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use nidus_proto::node::{SandboxNetworkConfig, SandboxNetworkIngressConfig};

    use super::*;

    #[test]
    fn a_child_has_ids_and_secrets_of_its_own() {
        let ingress = SandboxNetworkIngressConfig {
            traffic_access_token: Some("traffic".into()),
            mask_request_host: Some("mask".into()),
            ..Default::default()
        };
        let parent = SandboxConfig {
            sandbox_id: "parent".into(),
            build_id: "b".into(),
            envd_access_token: Some("token".into()),
            execution_id: "e".into(),
            network: Some(SandboxNetworkConfig { ingress: Some(ingress), ..Default::default() }),
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            ..Default::default()
        };
        let [a, b] = [(); 2].map(|()| child_of(&parent).unwrap());
        let of = |c: &SandboxConfig| {
            let traffic = c.network.clone().unwrap().ingress.unwrap().traffic_access_token.unwrap();
            [c.sandbox_id.clone(), c.execution_id.clone(), c.envd_access_token.clone().unwrap(), traffic]
        };
        for (n, mine) in of(&a).iter().enumerate() {
            assert!(*mine != of(&b)[n] && *mine != of(&parent)[n]);
        }
        assert_eq!((&a.metadata, a.build_id.as_str()), (&parent.metadata, "b"));
        assert_eq!(a.network.unwrap().ingress.unwrap().mask_request_host.as_deref(), Some("mask"));
        let open = SandboxConfig { envd_access_token: None, network: None, ..parent };
        assert_eq!(child_of(&open).unwrap().envd_access_token, None);
    }

    #[test]
    fn filters_of_the_list() {
        let f = filter("sandboxID=a&name=n%3Adefault&limit=500&nextToken=7").unwrap();
        assert_eq!((f.sandbox.as_deref(), f.name.as_deref(), f.limit), (Some("a"), Some("n"), 100));
        assert_eq!(f.before, Some(7));
        for bad in ["limit=0", "limit=x", "nextToken=x"] {
            assert_eq!(filter(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
