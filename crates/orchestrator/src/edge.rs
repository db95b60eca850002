//! Logs and figures of sandboxes over HTTP, as the edge of a cluster serves them (shared contract, http.md).
//! Like the node's gRPC it is for the control plane, which says whose they have to be.

use std::sync::Arc;

use axum::extract::{Path, Query, RawQuery, State};
use axum::routing::get;
use axum::{Json, Router};
use nidus_telemetry::{GuestLog, LogLevel};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Node;
use crate::metrics::{Sample, TeamSample};

/// Entries of logs in one answer.
const MOST_ENTRIES: usize = 1000;

type Shared = State<Arc<Node>>;

/// Their routes.
pub(crate) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/sandboxes/metrics", get(newest))
        .route("/v1/sandboxes/{id}/metrics", get(metrics))
        .route("/v1/sandboxes/{id}/logs", get(logs))
        .route("/v1/teams/{id}/metrics", get(team_metrics))
        .with_state(node)
}

/// Seconds since 1970.
#[derive(Debug, Deserialize)]
struct Span {
    start: Option<i64>,
    end: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct OfTeam {
    #[serde(rename = "teamID")]
    team_id: String,
}

async fn metrics(
    State(node): Shared,
    Path(id): Path<String>,
    Query(of): Query<OfTeam>,
    Query(span): Query<Span>,
) -> Json<Vec<Sample>> {
    Json(node.metrics.of(&of.team_id, &id, span.start, span.end))
}

async fn newest(State(node): Shared, Query(of): Query<OfTeam>, RawQuery(query): RawQuery) -> Json<Value> {
    let query = query.unwrap_or_default();
    let ids = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == "sandbox_ids");
    let mut found = Map::new();
    for id in ids.flat_map(|(_, ids)| ids.split(',').map(str::to_owned).collect::<Vec<_>>()) {
        if let Some(sample) = node.metrics.newest(&of.team_id, &id) {
            found.insert(id, json!(sample));
        }
    }
    Json(json!({ "sandboxes": found }))
}

async fn team_metrics(
    State(node): Shared,
    Path(id): Path<String>,
    Query(span): Query<Span>,
) -> Json<Vec<TeamSample>> {
    Json(node.metrics.of_team(&id, span.start, span.end))
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    #[default]
    Forward,
    Backward,
}

/// Milliseconds since 1970; the ends belong to it.
#[derive(Debug, Default, Deserialize)]
struct LogQuery {
    start: Option<i64>,
    end: Option<i64>,
    limit: Option<usize>,
    #[serde(default)]
    direction: Direction,
    level: Option<LogLevel>,
    search: Option<String>,
}

impl LogQuery {
    /// The entries that are asked for, of all of them in the order of time.
    fn of(&self, mut all: Vec<GuestLog>) -> Vec<GuestLog> {
        let search = self.search.as_deref().map(str::to_lowercase);
        all.retain(|log| {
            let at = log.timestamp.timestamp_millis();
            self.start.is_none_or(|s| at >= s)
                && self.end.is_none_or(|e| at <= e)
                && self.level.is_none_or(|l| log.level >= l)
                && search.as_ref().is_none_or(|s| log.message.to_lowercase().contains(s))
        });
        if self.direction == Direction::Backward {
            all.reverse();
        }
        all.truncate(self.limit.unwrap_or(MOST_ENTRIES).min(MOST_ENTRIES));
        all
    }
}

/// An entry's fields as texts, and the entry as one line of JSON.
fn fields(log: &GuestLog) -> (Map<String, Value>, String) {
    let mut fields: Map<String, Value> = Map::new();
    for (name, value) in &log.fields {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        fields.insert(name.clone(), text.into());
    }
    fields.entry("logger").or_insert_with(|| "guest".into());
    let mut line = fields.clone();
    line.insert("level".into(), json!(log.level));
    line.insert("message".into(), log.message.clone().into());
    line.insert("timestamp".into(), json!(log.timestamp));
    (fields, Value::Object(line).to_string())
}

async fn logs(
    State(node): Shared,
    Path(id): Path<String>,
    Query(of): Query<OfTeam>,
    Query(query): Query<LogQuery>,
) -> Json<Value> {
    let (mut lines, mut entries) = (Vec::new(), Vec::new());
    for log in query.of(node.network.kept_logs.of(&of.team_id, &id)) {
        let (fields, line) = fields(&log);
        lines.push(json!({ "timestamp": log.timestamp, "line": line }));
        entries.push(json!({
            "timestamp": log.timestamp, "message": log.message, "level": log.level, "fields": fields
        }));
    }
    Json(json!({ "logs": lines, "logEntries": entries }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::DateTime;
    use nidus_telemetry::LogOrigin;

    use super::*;

    fn log(ms: i64, level: LogLevel, message: &str) -> GuestLog {
        let text = |t: &str| t.to_owned();
        let origin = LogOrigin {
            sandbox_id: text("s"),
            team_id: text("t"),
            template_id: text("x"),
            execution_id: text("e"),
        };
        GuestLog {
            timestamp: DateTime::from_timestamp_millis(ms).unwrap(),
            origin: Arc::new(origin),
            level,
            message: message.to_owned(),
            fields: Map::from_iter([("n".to_owned(), json!(1))]),
        }
    }

    #[test]
    fn logs_by_time_level_text_and_direction() {
        let all = vec![
            log(1, LogLevel::Info, "One"),
            log(2, LogLevel::Error, "two"),
            log(3, LogLevel::Debug, "one again"),
        ];
        let of = |q: LogQuery| -> Vec<i64> {
            q.of(all.clone()).iter().map(|l| l.timestamp.timestamp_millis()).collect()
        };
        assert_eq!(of(LogQuery::default()), [1, 2, 3]);
        assert_eq!(of(LogQuery { start: Some(2), ..Default::default() }), [2, 3]);
        let back =
            LogQuery { end: Some(2), direction: Direction::Backward, limit: Some(1), ..Default::default() };
        assert_eq!(of(back), [2]);
        assert_eq!(of(LogQuery { level: Some(LogLevel::Info), ..Default::default() }), [1, 2]);
        assert_eq!(of(LogQuery { search: Some("ONE".into()), ..Default::default() }), [1, 3]);
    }

    #[test]
    fn a_line_is_json_and_fields_are_texts() {
        let (fields, line) = fields(&log(0, LogLevel::Warn, "a\nb"));
        assert_eq!(Value::Object(fields), json!({ "n": "1", "logger": "guest" }));
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&json!("warn"), &json!("a\nb")));
    }
}
