//! Logs and figures of sandboxes and teams. The nodes keep them, for an hour or so.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use chrono::{DateTime, Utc};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::auth::Team;
use crate::sandboxes::not_found;
use crate::{Api, ApiError};

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
struct Asked(Vec<(String, String)>);

impl Asked {
    fn new(query: Option<String>) -> Self {
        let query = query.unwrap_or_default();
        Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, v)| n == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }

    fn number(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(n) if n >= 0 => Ok(Some(n)),
            _ => Err(ApiError::bad(format!("{name} '{}' is not a number from 0 on", text.escape_debug()))),
        }
    }

    fn one_of(&self, name: &str, all: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
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
    /// Nothing is kept of it: is it one at all?
    async fn check_known(&self, team: &Team, id: &str) -> Result<(), ApiError> {
        if self.running(team, id).await?.is_some() || self.paused(team, id).await?.is_some() {
            return Ok(());
        }
        Err(not_found(id))
    }
}

/// Ids are letters and digits: nothing else gets into the path of a request to the node.
fn check_id(id: &str) -> Result<(), ApiError> {
    let plain = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric());
    if plain { Ok(()) } else { Err(not_found(id)) }
}

pub async fn metrics(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<SandboxMetric>>, ApiError> {
    check_id(&id)?;
    let (start, end) = Asked::new(query).span()?;
    let all: Vec<SandboxMetric> = api
        .nodes
        .get(&at_node(
            &format!("/v1/sandboxes/{id}/metrics"),
            &[
                ("teamID", Some(team.id.clone())),
                ("start", start.map(|n| n.to_string())),
                ("end", end.map(|n| n.to_string())),
            ],
        ))
        .await?;
    if all.is_empty() {
        api.check_known(&team, &id).await?;
    }
    Ok(Json(all))
}

pub async fn metrics_of_many(
    State(api): Shared,
    team: Team,
    RawQuery(query): RawQuery,
) -> Result<Json<SandboxesWithMetrics>, ApiError> {
    let asked = Asked::new(query);
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
    check_id(id)?;
    let mut all = vec![("teamID", Some(team.id.clone()))];
    all.extend(query.iter().cloned());
    let logs: Logs = api.nodes.get(&at_node(&format!("/v1/sandboxes/{id}/logs"), &all)).await?;
    if logs.log_entries.is_empty() {
        api.check_known(team, id).await?;
    }
    Ok(logs)
}

pub async fn logs_v1(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Logs>, ApiError> {
    let asked = Asked::new(query);
    let text = |n: Option<i64>| n.map(|n| n.to_string());
    let query = [("start", text(asked.number("start")?)), ("limit", text(asked.number("limit")?))];
    Ok(Json(logs_of(&api, &team, &id, &query).await?))
}

pub async fn logs_v2(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let asked = Asked::new(query);
    let text = |n: Option<i64>| n.map(|n| n.to_string());
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
    let text = |n: Option<i64>| n.map(|n| n.to_string());
    api.nodes
        .get(&at_node(&format!("/v1/teams/{id}/metrics"), &[("start", text(start)), ("end", text(end))]))
        .await
}

pub async fn team_metrics(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<TeamMetric>>, ApiError> {
    Ok(Json(of_team(&api, &team, &id, &Asked::new(query)).await?))
}

pub async fn team_metrics_max(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let asked = Asked::new(query);
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
        let asked = |q: &str| Asked::new(Some(q.to_owned()));
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
        assert!(check_id("iabc123").is_ok());
        for bad in ["", "../metrics", "a/b", "a?b", "a%2f", "\u{e4}", &"a".repeat(65)] {
            assert_eq!(check_id(bad).unwrap_err().status, 404, "{bad}");
        }
        let query = [("teamID", Some("t&x=1 #".to_owned())), ("start", None)];
        assert_eq!(at_node("/v1/x", &query), "/v1/x?teamID=t%26x%3D1+%23");
    }
}
