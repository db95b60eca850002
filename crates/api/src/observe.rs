//! Logs and figures of sandboxes and teams. The nodes keep them, for an hour or so.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use chrono::{DateTime, Utc};
use http::StatusCode;
use http::request::Parts;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::auth::Team;
use crate::sandboxes::not_found;
use crate::{Api, ApiError, list};

type Shared = State<Arc<Api>>;

/// Sandboxes that may be asked for at once.
const MOST_SANDBOXES: usize = 100;

/// As the node says it, and with the public API's names.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all(serialize = "camelCase"))]
pub struct SandboxMetric {
    timestamp: DateTime<Utc>,
    timestamp_unix: i64,
    cpu_count: i32,
    cpu_used_pct: f64,
    mem_used: i64,
    mem_total: i64,
    mem_cache: i64,
    disk_used: i64,
    disk_total: i64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct SandboxesWithMetrics {
    sandboxes: BTreeMap<String, SandboxMetric>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all(serialize = "camelCase"))]
pub struct TeamMetric {
    timestamp: DateTime<Utc>,
    timestamp_unix: i64,
    concurrent_sandboxes: u32,
    sandbox_start_rate: f64,
}

/// A query string's parts, by name.
pub struct Asked(Vec<(String, String)>);

impl Asked {
    fn new(query: &str) -> Self {
        Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, v)| n == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }

    pub fn number(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(n) if n >= 0 => Ok(Some(n)),
            _ => Err(ApiError::bad(format!("{name} '{}' is not a number from 0 on", text.escape_debug()))),
        }
    }

    pub fn one_of(&self, name: &str, all: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let found = all.iter().find(|a| a.eq_ignore_ascii_case(text));
        let bad =
            || ApiError::bad(format!("{name} '{}' is not one of {}", text.escape_debug(), all.join(", ")));
        found.copied().map(Some).ok_or_else(bad)
    }

    /// Start and end in seconds, in their order.
    fn span(&self) -> Result<(Option<i64>, Option<i64>), ApiError> {
        let (start, end) = (self.number("start")?, self.number("end")?);
        if let (Some(s), Some(e)) = (start, end)
            && s > e
        {
            return Err(ApiError::bad(format!("start {s} is after end {e}")));
        }
        Ok((start, end))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::new(parts.uri.query().unwrap_or_default()))
    }
}

/// A number as it is asked of the node, if it is.
fn text(n: Option<i64>) -> Option<String> {
    n.map(|n| n.to_string())
}

/// A path and a query for the node; what is not asked for is left out.
fn at_node(path: &str, query: &[(&str, Option<String>)]) -> String {
    let mut out = form_urlencoded::Serializer::for_suffix(format!("{path}?"), path.len() + 1);
    for (name, value) in query {
        if let Some(value) = value {
            out.append_pair(name, value);
        }
    }
    out.finish()
}

impl Api {
    /// What a node keeps of a team's sandbox. Where that is nothing, there has to be such a sandbox.
    async fn kept_of<T: DeserializeOwned>(
        &self,
        team: &Team,
        id: &str,
        what: &str,
        query: &[(&str, Option<String>)],
        is_nothing: impl Fn(&T) -> bool,
    ) -> Result<T, ApiError> {
        // Nothing but an id gets into the path of a request to the node.
        if !list::is_id(id) {
            return Err(not_found(id));
        }
        let mut all = vec![("teamID", Some(team.id.clone()))];
        all.extend(query.iter().cloned());
        let kept: T = self.nodes.get(&at_node(&format!("/v1/sandboxes/{id}/{what}"), &all)).await?;
        if is_nothing(&kept)
            && self.running(team, id).await?.is_none()
            && self.paused(team, id).await?.is_none()
        {
            return Err(not_found(id));
        }
        Ok(kept)
    }
}

pub async fn metrics(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Vec<SandboxMetric>>, ApiError> {
    let (start, end) = asked.span()?;
    let query = [("start", text(start)), ("end", text(end))];
    Ok(Json(api.kept_of(&team, &id, "metrics", &query, Vec::is_empty).await?))
}

pub async fn metrics_of_many(
    State(api): Shared,
    team: Team,
    asked: Asked,
) -> Result<Json<SandboxesWithMetrics>, ApiError> {
    let ids = asked.0.iter().filter(|(name, _)| name == "sandbox_ids" || name == "sandbox_ids[]");
    let ids: Vec<&str> = ids.flat_map(|(_, ids)| ids.split(',')).filter(|id| !id.is_empty()).collect();
    if ids.is_empty() || ids.len() > MOST_SANDBOXES {
        return Err(ApiError::bad(format!(
            "sandbox_ids names {} sandboxes, not 1 to {MOST_SANDBOXES}",
            ids.len()
        )));
    }
    let path =
        at_node("/v1/sandboxes/metrics", &[("teamID", Some(team.id)), ("sandbox_ids", Some(ids.join(",")))]);
    Ok(Json(api.nodes.get(&path).await?))
}

/// What a node says of logs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Logs {
    logs: Vec<Value>,
    log_entries: Vec<Value>,
}

const LEVELS: &[&str] = &["debug", "info", "warn", "error"];

async fn logs_of(
    api: &Api,
    team: &Team,
    id: &str,
    query: &[(&str, Option<String>)],
) -> Result<Logs, ApiError> {
    api.kept_of(team, id, "logs", query, |logs: &Logs| logs.log_entries.is_empty()).await
}

pub async fn logs_v1(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Logs>, ApiError> {
    let query = [("start", text(asked.number("start")?)), ("limit", text(asked.number("limit")?))];
    Ok(Json(logs_of(&api, &team, &id, &query).await?))
}

pub async fn logs_v2(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let direction = asked.one_of("direction", &["forward", "backward"])?.unwrap_or("forward");
    // A page goes on from the cursor, whichever way.
    let from = if direction == "forward" { "start" } else { "end" };
    let query = [
        (from, text(asked.number("cursor")?)),
        ("limit", text(asked.number("limit")?)),
        ("direction", Some(direction.to_owned())),
        ("level", asked.one_of("level", LEVELS)?.map(str::to_owned)),
        ("search", asked.text("search").map(str::to_owned)),
    ];
    let logs = logs_of(&api, &team, &id, &query).await?;
    Ok(Json(json!({ "logs": logs.log_entries })))
}

async fn of_team(api: &Api, team: &Team, id: &str, asked: &Asked) -> Result<Vec<TeamMetric>, ApiError> {
    if id != team.id {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "The API key is not of this team"));
    }
    let (start, end) = asked.span()?;
    api.nodes
        .get(&at_node(&format!("/v1/teams/{id}/metrics"), &[("start", text(start)), ("end", text(end))]))
        .await
}

pub async fn team_metrics(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Vec<TeamMetric>>, ApiError> {
    Ok(Json(of_team(&api, &team, &id, &asked).await?))
}

pub async fn team_metrics_max(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let Some(metric) = asked.one_of("metric", &["concurrent_sandboxes", "sandbox_start_rate"])? else {
        return Err(ApiError::bad("metric is missing: concurrent_sandboxes or sandbox_start_rate"));
    };
    let value = |m: &TeamMetric| match metric {
        "concurrent_sandboxes" => f64::from(m.concurrent_sandboxes),
        _ => m.sandbox_start_rate,
    };
    let all = of_team(&api, &team, &id, &asked).await?;
    let most = all.iter().max_by(|a, b| value(a).total_cmp(&value(b)));
    let at = most.map_or_else(Utc::now, |m| m.timestamp);
    Ok(Json(json!({ "timestamp": at, "timestampUnix": at.timestamp(), "value": most.map_or(0.0, value) })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_checked() {
        let asked = |q: &str| Asked::new(q);
        assert_eq!(asked("start=1&end=2").span().unwrap(), (Some(1), Some(2)));
        assert_eq!(asked("start=&x=1").span().unwrap(), (None, None));
        for bad in ["start=2&end=1", "start=x", "end=-1", "start=99999999999999999999"] {
            assert_eq!(asked(bad).span().unwrap_err().status, 400, "{bad}");
        }
        assert_eq!(asked("level=WARN").one_of("level", LEVELS).unwrap(), Some("warn"));
        assert_eq!(asked("level=loud").one_of("level", LEVELS).unwrap_err().status, 400);
    }

    #[test]
    fn nothing_but_an_id_gets_into_a_path() {
        assert!(list::is_id("iabc123"));
        for bad in ["", "../metrics", "a/b", "a?b", "a%2f", "\u{e4}", &"a".repeat(65)] {
            assert!(!list::is_id(bad), "{bad}");
        }
        let query = [("teamID", Some("t&x=1 #".to_owned())), ("start", None)];
        assert_eq!(at_node("/v1/x", &query), "/v1/x?teamID=t%26x%3D1+%23");
    }
}
