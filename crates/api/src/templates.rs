//! Templates and their builds over REST.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use http::StatusCode;
use nidus_proto::node::{
    LogLevel, LogsDirection, TemplateBuildDeleteRequest, TemplateBuildLogEntry, TemplateStatusRequest,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth::Team;
use crate::input::Input;
use crate::model::stamp;
use crate::sandboxes::time;
use crate::store::{BuildRow, BuildStatus, TemplateRow};
use crate::tags::split;
use crate::{Api, ApiError};

/// Longest name of a template.
pub const MAX_NAME: usize = 64;
/// Lines of a log in one answer.
const MAX_ENTRIES: u32 = 100;

type Shared = State<Arc<Api>>;

fn template_json(t: &TemplateRow, builds: &[BuildRow]) -> Value {
    let ready = builds.iter().find(|b| b.status == BuildStatus::Ready).or(builds.first());
    json!({
        "templateID": t.id,
        "buildID": ready.map_or("", |b| b.id.as_str()),
        "cpuCount": ready.map_or(0, |b| b.cpu_count),
        "memoryMB": ready.map_or(0, |b| b.memory_mb),
        "diskSizeMB": ready.map_or(0, |b| b.disk_mb),
        "public": t.public,
        "aliases": t.aliases,
        "names": t.aliases,
        "createdAt": stamp(t.created_at),
        "updatedAt": stamp(t.updated_at),
        "createdBy": null,
        "lastSpawnedAt": t.last_spawned_at.map(stamp),
        "spawnCount": t.spawn_count,
        "buildCount": builds.len(),
        "envdVersion": ready.map_or("", |b| b.envd_version.as_str()),
        "buildStatus": ready.map_or(BuildStatus::Waiting, |b| b.status),
    })
}

fn build_json(b: &BuildRow) -> Value {
    json!({
        "buildID": b.id,
        "status": b.status,
        "createdAt": stamp(b.created_at),
        "updatedAt": stamp(b.updated_at),
        "finishedAt": b.finished_at.map(stamp),
        "cpuCount": b.cpu_count,
        "memoryMB": b.memory_mb,
        "diskSizeMB": b.disk_mb,
        "envdVersion": b.envd_version,
    })
}

fn missing(name: &str) -> ApiError {
    let name: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
    ApiError::not_found(format!("Template '{name}' was not found"))
}

impl Api {
    pub(crate) async fn seen(&self, team: &Team, name: &str) -> Result<TemplateRow, ApiError> {
        let t = self.store.template(split(name).0).await?.filter(|t| t.public || t.team_id == team.id);
        t.ok_or_else(|| missing(name))
    }

    pub(crate) async fn owned(&self, team: &Team, name: &str) -> Result<TemplateRow, ApiError> {
        let t = self.store.template(split(name).0).await?.filter(|t| t.team_id == team.id);
        t.ok_or_else(|| missing(name))
    }

    pub(crate) async fn owned_build(
        &self,
        team: &Team,
        template: &str,
        build: &str,
    ) -> Result<BuildRow, ApiError> {
        let t = self.owned(team, template).await?;
        let b = self.store.build(build).await?.filter(|b| b.template_id == t.id);
        b.ok_or_else(|| ApiError::not_found(format!("The template has no build '{}'", build.escape_debug())))
    }

    /// Whether sandboxes of a template run or are paused.
    async fn has_sandboxes(&self, t: &TemplateRow) -> Result<bool, ApiError> {
        let paused = self.store.snapshots(&t.team_id).await?;
        let of = |id: &str| id == t.id;
        if paused.iter().any(|s| of(&s.config.base_template_id) || of(&s.config.template_id)) {
            return Ok(true);
        }
        let running = self.nodes.list().await?;
        Ok(running.iter().filter_map(|s| s.config.as_ref()).any(|c| of(&c.template_id)))
    }
}

pub async fn list(
    State(api): Shared,
    team: Team,
    asked: crate::observe::Asked,
) -> Result<Json<Vec<Value>>, ApiError> {
    if asked.text("teamID").is_some_and(|id| id != team.id) {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "The API key is not one of the team in teamID"));
    }
    let mut all = Vec::new();
    for t in api.store.templates(&team.id).await? {
        all.push(template_json(&t, &api.store.builds(&t.id).await?));
    }
    Ok(Json(all))
}

/// The templates that all teams have.
pub async fn defaults(State(api): Shared, team: Team) -> Result<Json<Vec<Value>>, ApiError> {
    let mut all = Vec::new();
    for t in api.store.templates(&team.id).await?.iter().filter(|t| t.public) {
        let mut json = template_json(t, &api.store.builds(&t.id).await?);
        json["isDefault"] = json!(true);
        all.push(json);
    }
    Ok(Json(all))
}

#[derive(Debug, Deserialize)]
pub struct Update {
    public: Option<bool>,
}

/// Publishes a template to all teams, or takes that back.
pub async fn update(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    Input(update): Input<Update>,
) -> Result<Json<Value>, ApiError> {
    let t = api.owned(&team, &id).await?;
    if let Some(public) = update.public {
        api.store.set_public(&t.id, public).await?;
    }
    Ok(Json(json!({ "names": t.aliases })))
}

pub async fn detail(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &id).await?;
    let builds = api.store.builds(&t.id).await?;
    let mut answer = template_json(&t, &builds);
    answer["builds"] = builds.iter().map(build_json).collect();
    Ok(Json(answer))
}

pub async fn alias(
    State(api): Shared,
    team: Team,
    Path(alias): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &alias).await?;
    Ok(Json(json!({ "templateID": t.id, "public": t.public })))
}

pub async fn delete(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let t = api.owned(&team, &id).await?;
    for b in api.store.builds(&t.id).await? {
        let request = TemplateBuildDeleteRequest { build_id: b.id.clone(), template_id: t.id.clone() };
        match api.nodes.templates().template_build_delete(request).await {
            Ok(_) => {}
            // It failed, or is gone already.
            Err(s) if s.code() == tonic::Code::NotFound => {}
            // Sandboxes made of a snapshot outlive it; its build goes with the last of them.
            // What was built upon it does too.
            Err(s)
                if s.code() == tonic::Code::FailedPrecondition
                    && (t.snapshot_of.is_some() || !api.has_sandboxes(&t).await?) =>
            {
                api.store.note_checkpoint(&b.id, &t.id).await?;
            }
            Err(s) => return Err(s.into()),
        }
    }
    api.store.delete_template(&t.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A name that can stand in a URL and in front of a tag.
pub fn check_name(name: &str) -> Result<(), ApiError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(ApiError::bad(format!(
            "Template name '{shown}': a name has 1 to {MAX_NAME} lower-case letters, digits, '-' and '_'"
        )));
    }
    Ok(())
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogQuery {
    logs_offset: Option<i32>,
    limit: Option<u32>,
    level: Option<String>,
    direction: Option<String>,
    cursor: Option<i64>,
}

fn level(name: &str) -> Result<i32, ApiError> {
    Ok(match name {
        "debug" => LogLevel::Debug,
        "info" => LogLevel::Info,
        "warn" => LogLevel::Warn,
        "error" => LogLevel::Error,
        _ => return Err(ApiError::bad(format!("level '{}' is not a log level", name.escape_debug()))),
    } as i32)
}

fn log_json(e: &TemplateBuildLogEntry) -> Value {
    let level = LogLevel::try_from(e.level).unwrap_or(LogLevel::Info).as_str_name().to_lowercase();
    let mut entry = json!({ "timestamp": stamp(time(e.timestamp)), "message": e.message, "level": level });
    if let Some(step) = e.fields.get("step") {
        entry["step"] = json!(step);
    }
    entry
}

fn status_request(b: &BuildRow, q: &LogQuery) -> Result<TemplateStatusRequest, ApiError> {
    let backward = match q.direction.as_deref() {
        None | Some("forward") => LogsDirection::Forward,
        Some("backward") => LogsDirection::Backward,
        Some(d) => {
            return Err(ApiError::bad(format!(
                "direction '{}' is not forward or backward",
                d.escape_debug()
            )));
        }
    };
    let start = q.cursor.map(|ms| prost_types::Timestamp {
        seconds: ms.div_euclid(1000),
        nanos: (ms.rem_euclid(1000) * 1_000_000) as i32,
    });
    Ok(TemplateStatusRequest {
        template_id: b.template_id.clone(),
        build_id: b.id.clone(),
        offset: q.logs_offset,
        level: q.level.as_deref().map(level).transpose()?,
        limit: Some(q.limit.unwrap_or(MAX_ENTRIES).min(MAX_ENTRIES)),
        start,
        end: None,
        direction: Some(backward as i32),
    })
}

/// Lines of a build that the node remembers; none of one that it does not.
async fn logs(api: &Api, b: &BuildRow, q: &LogQuery) -> Result<Vec<TemplateBuildLogEntry>, ApiError> {
    match api.nodes.templates().template_build_status(status_request(b, q)?).await {
        Ok(answer) => Ok(answer.into_inner().log_entries),
        Err(s) if s.code() == tonic::Code::NotFound => Ok(Vec::new()),
        Err(s) => Err(s.into()),
    }
}

pub async fn build_status(
    State(api): Shared,
    team: Team,
    Path((template, build)): Path<(String, String)>,
    Query(q): Query<LogQuery>,
) -> Result<Json<Value>, ApiError> {
    let b = api.owned_build(&team, &template, &build).await?;
    let logs = logs(&api, &b, &q).await?;
    // Read again: what it was when the lines were read, or later.
    let b = api.owned_build(&team, &template, &build).await?;
    let entries: Vec<Value> = logs.iter().map(log_json).collect();
    let lines: Vec<&str> = logs.iter().map(|l| l.message.as_str()).collect();
    let mut answer = json!({
        "templateID": b.template_id, "buildID": b.id, "status": b.status,
        "logs": lines, "logEntries": entries,
    });
    // What there is not is left out: clients do not expect null.
    if let Some(message) = &b.reason {
        let mut reason = json!({ "message": message, "logEntries": [] });
        if let Some(step) = &b.failed_step {
            reason["step"] = json!(step);
        }
        if b.failed_layer.is_some() {
            // Ours: what sandboxes of the state before the failure are made of.
            reason["layer"] = json!(b.id);
        }
        answer["reason"] = reason;
    }
    Ok(Json(answer))
}

pub async fn build_logs(
    State(api): Shared,
    team: Team,
    Path((template, build)): Path<(String, String)>,
    Query(q): Query<LogQuery>,
) -> Result<Json<Value>, ApiError> {
    let b = api.owned_build(&team, &template, &build).await?;
    let entries: Vec<Value> = logs(&api, &b, &q).await?.iter().map(log_json).collect();
    Ok(Json(json!({ "logs": entries })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(check_name("my-template_2").is_ok());
        for bad in ["", "Upper", "a b", "a:b", "../x", &"x".repeat(65)] {
            assert_eq!(check_name(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
