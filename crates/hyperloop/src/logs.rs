//! The body of `POST /logs`, which a guest wrote.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use nidus_telemetry::{GuestLog, LogLevel, LogOrigin};
use serde_json::{Map, Value};

/// Longest text of one entry in bytes; the rest is cut off.
const MAX_MESSAGE: usize = 16 << 10;
/// Most fields beside it.
const MAX_FIELDS: usize = 64;

/// What is wrong with a body.
#[derive(Debug, PartialEq, Eq)]
pub enum LogsError {
    /// Not JSON, or not objects.
    Format(String),
    /// More entries than a request may have.
    Many(usize),
}

/// The entries of a body: an object, an array of objects, or an object in each line. `limit` bounds their
/// number.
pub fn parse(
    body: &[u8],
    origin: &Arc<LogOrigin>,
    now: DateTime<Utc>,
    limit: usize,
) -> Result<Vec<GuestLog>, LogsError> {
    let bad = |e: &dyn std::fmt::Display| LogsError::Format(e.to_string());
    let mut objects = Vec::new();
    for value in serde_json::Deserializer::from_slice(body).into_iter::<Value>() {
        match value.map_err(|e| bad(&e))? {
            Value::Array(all) => objects.extend(all),
            one => objects.push(one),
        }
        if objects.len() > limit {
            return Err(LogsError::Many(limit));
        }
    }
    if objects.is_empty() {
        return Err(bad(&"there is no entry in it"));
    }
    let entry = |value| match value {
        Value::Object(object) => Ok(entry(object, origin, now)),
        other => Err(bad(&format!("an entry is an object, not {}", kind(&other)))),
    };
    objects.into_iter().map(entry).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Fields that say whose entry it is: the node knows better.
const ORIGIN: &[&str] = &["instanceID", "sandboxID", "teamID", "envID", "templateID", "executionID"];

fn entry(mut fields: Map<String, Value>, origin: &Arc<LogOrigin>, now: DateTime<Utc>) -> GuestLog {
    let mut text = |names: &[&str]| {
        let name = names.iter().find(|n| fields.get(**n).is_some_and(Value::is_string))?;
        match fields.remove(*name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    };
    let level = text(&["level", "severity"]).map_or(LogLevel::Info, |l| LogLevel::of(&l));
    let mut message = text(&["message", "msg", "line", "data"]).unwrap_or_default();
    if message.len() > MAX_MESSAGE {
        let end = (0..=MAX_MESSAGE).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
        message.truncate(end);
    }
    for name in ORIGIN {
        fields.remove(*name);
    }
    let fields = fields.into_iter().take(MAX_FIELDS).collect();
    GuestLog { timestamp: now, origin: origin.clone(), level, message, fields }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin() -> Arc<LogOrigin> {
        let text = |t: &str| t.to_owned();
        Arc::new(LogOrigin {
            sandbox_id: text("me"),
            team_id: text("team"),
            template_id: text("t"),
            execution_id: text("e"),
        })
    }

    fn of(body: &str) -> Result<Vec<GuestLog>, LogsError> {
        parse(body.as_bytes(), &origin(), DateTime::UNIX_EPOCH, 3)
    }

    #[test]
    fn one_many_or_lines() {
        for (body, n) in [
            (r#"{"message":"a"}"#, 1),
            (r#"[{"message":"a"},{"msg":"b"}]"#, 2),
            ("{\"line\":\"a\"}\n{\"message\":\"b\"}\n{}\n", 3),
        ] {
            assert_eq!(of(body).unwrap().len(), n, "{body}");
        }
        assert_eq!(of("[{},{},{},{}]"), Err(LogsError::Many(3)));
        for body in ["", "[]", "x", "{", "[1]", "\"text\"", "{} x"] {
            assert!(matches!(of(body), Err(LogsError::Format(_))), "{body}");
        }
    }

    #[test]
    fn nobody_speaks_for_another() {
        let log = of(
            r#"{"sandboxID":"other","instanceID":"other","teamID":"x","message":"m","level":"error","n":1}"#,
        );
        let log = &log.unwrap()[0];
        assert_eq!((log.origin.sandbox_id.as_str(), log.origin.team_id.as_str()), ("me", "team"));
        assert_eq!(log.level, LogLevel::Error);
        assert_eq!(serde_json::to_value(&log.fields).unwrap(), serde_json::json!({"n": 1}));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let body = serde_json::json!({ "message": "ä".repeat(MAX_MESSAGE) }).to_string();
        let log = &of(&body).unwrap()[0];
        assert!(log.message.len() <= MAX_MESSAGE && log.message.chars().all(|c| c == 'ä'));
    }

    proptest! {
        #[test]
        fn nothing_panics(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&body, &origin(), DateTime::UNIX_EPOCH, 3);
        }
    }
}
