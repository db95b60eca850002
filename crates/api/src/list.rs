//! Lists in pages, and what they are filtered by.

use std::borrow::Cow;
use std::collections::HashMap;

use chrono::{DateTime, Utc};
use nidus_proto::node::RunningSandbox;
use percent_encoding::percent_decode_str;

use crate::ApiError;

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 100;

/// A sandbox that runs, or a paused one in the same form.
#[derive(Debug, Clone)]
pub struct Known {
    pub sandbox: RunningSandbox,
    pub paused: bool,
}

/// The query of `GET /v2/sandboxes`.
#[derive(Debug, Default)]
pub struct Query {
    pub metadata: HashMap<String, String>,
    pub running: bool,
    pub paused: bool,
    pub ascending: bool,
    pub started_after: Option<DateTime<Utc>>,
    pub template: Option<String>,
    pub limit: usize,
    after: Option<Position>,
}

/// Where a page ended: the start time and id of its last sandbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    started: DateTime<Utc>,
    id: String,
}

impl Position {
    fn of(known: &Known) -> Self {
        let s = &known.sandbox;
        Self { started: started(s), id: id(s).to_owned() }
    }

    fn token(&self) -> String {
        format!("{}_{}", self.started.timestamp_micros(), self.id)
    }

    fn parse(token: &str) -> Option<Self> {
        let (time, id) = token.split_once('_')?;
        let started = DateTime::from_timestamp_micros(time.parse().ok()?)?;
        is_id(id).then(|| Self { started, id: id.to_owned() })
    }
}

/// When a sandbox was started, to the microsecond, as tokens have it.
pub fn started(s: &RunningSandbox) -> DateTime<Utc> {
    let t = s.start_time.unwrap_or_default();
    DateTime::from_timestamp_micros(t.seconds * 1_000_000 + i64::from(t.nanos) / 1000).unwrap_or_default()
}

/// Its id.
pub fn id(s: &RunningSandbox) -> &str {
    s.config.as_ref().map_or(&s.sandbox_id, |c| &c.sandbox_id)
}

/// Whether a client's text can be the id of a sandbox: letters and digits, and not many.
pub fn is_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// `a=b&c=d`, percent-encoded within the parameter. The SDKs encode names and values, and then the
/// pairs of them once more.
pub fn metadata(text: &str) -> HashMap<String, String> {
    let again = |t: &str| percent_decode_str(t).decode_utf8().map_or_else(|_| t.to_owned(), Cow::into_owned);
    form_urlencoded::parse(text.as_bytes())
        .filter(|(k, _)| !k.is_empty())
        .map(|(k, v)| (again(&k), again(&v)))
        .collect()
}

impl Query {
    /// Reads a query string.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let mut q = Self { limit: DEFAULT_LIMIT, ..Self::default() };
        let mut states: Vec<String> = Vec::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            let bad = |what: &str| ApiError::bad(format!("{name} '{}' is not {what}", value.escape_debug()));
            match name.as_ref() {
                "metadata" => q.metadata = metadata(&value),
                "state" => states.extend(value.split(',').filter(|s| !s.is_empty()).map(str::to_owned)),
                "order" => {
                    q.ascending = match value.as_ref() {
                        "asc" => true,
                        "desc" => false,
                        _ => return Err(bad("asc or desc")),
                    }
                }
                "startedAfter" => {
                    let time = DateTime::parse_from_rfc3339(&value).map_err(|_| bad("a time (RFC 3339)"))?;
                    q.started_after = Some(time.to_utc());
                }
                "template" => q.template = Some(value.into_owned()),
                "limit" => {
                    let limit: usize = value.parse().map_err(|_| bad("a number from 1 to 100"))?;
                    if limit == 0 {
                        return Err(bad("a number from 1 to 100"));
                    }
                    q.limit = limit.min(MAX_LIMIT);
                }
                "nextToken" if !value.is_empty() => {
                    q.after = Some(Position::parse(&value).ok_or_else(|| bad("a token of this list"))?);
                }
                _ => {}
            }
        }
        if let Some(odd) = states.iter().find(|s| !matches!(s.as_str(), "running" | "paused")) {
            return Err(ApiError::bad(format!("state '{}' is not running or paused", odd.escape_debug())));
        }
        let asked = |state: &str| states.is_empty() || states.iter().any(|s| s == state);
        (q.running, q.paused) = (asked("running"), asked("paused"));
        Ok(q)
    }

    fn takes(&self, known: &Known) -> bool {
        let s = &known.sandbox;
        let Some(c) = &s.config else { return false };
        (if known.paused { self.paused } else { self.running })
            && self.metadata.iter().all(|(k, v)| c.metadata.get(k) == Some(v))
            && self.started_after.is_none_or(|t| started(s) >= t)
            && self.template.as_ref().is_none_or(|t| c.template_id == *t || c.alias.as_deref() == Some(t))
    }

    /// One page and the token of the next.
    pub fn page(&self, all: Vec<Known>) -> (Vec<Known>, Option<String>) {
        let mut all: Vec<Known> = all.into_iter().filter(|s| self.takes(s)).collect();
        all.sort_by_cached_key(Position::of);
        if !self.ascending {
            all.reverse();
        }
        if let Some(after) = &self.after {
            all.retain(|s| {
                let at = Position::of(s);
                if self.ascending { at > *after } else { at < *after }
            });
        }
        let more = all.len() > self.limit;
        all.truncate(self.limit);
        let token = if more { all.last().map(|s| Position::of(s).token()) } else { None };
        (all, token)
    }
}

#[cfg(test)]
mod tests {
    use nidus_proto::node::SandboxConfig;
    use proptest::prelude::*;

    use super::*;

    fn sandbox(second: i64, id: &str) -> Known {
        let sandbox = RunningSandbox {
            start_time: Some(prost_types::Timestamp { seconds: second, nanos: 0 }),
            config: Some(SandboxConfig {
                sandbox_id: id.into(),
                metadata: HashMap::from([("k".into(), format!("{}", second % 2))]),
                ..Default::default()
            }),
            ..Default::default()
        };
        Known { sandbox, paused: second == 3 }
    }

    proptest! {
        #[test]
        fn pages_together_are_the_whole_list(
            seconds in prop::collection::vec(0i64..5, 0..30),
            limit in 1usize..7,
            ascending: bool,
        ) {
            let all: Vec<_> = seconds.iter().enumerate().map(|(i, s)| sandbox(*s, &format!("i{i}"))).collect();
            let mut expected: Vec<(i64, String)> =
                all.iter().map(|s| (s.sandbox.start_time.unwrap().seconds, id(&s.sandbox).to_owned())).collect();
            expected.sort();
            if !ascending { expected.reverse(); }
            let order = if ascending { "asc" } else { "desc" };
            let (mut seen, mut token) = (Vec::new(), String::new());
            loop {
                let q = Query::parse(&format!("limit={limit}&order={order}&nextToken={token}")).unwrap();
                let (page, next) = q.page(all.clone());
                prop_assert!(page.len() <= limit);
                seen.extend(page.iter().map(|s| (s.sandbox.start_time.unwrap().seconds, id(&s.sandbox).to_owned())));
                match next { Some(t) => token = t, None => break }
            }
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn metadata_encoded_once_or_twice() {
        for text in ["odd=a%26b%3Dc+d%2F%C5%BE", "odd=a%2526b%253Dc%2520d%2F%25C5%25BE"] {
            assert_eq!(metadata(text), HashMap::from([("odd".into(), "a&b=c d/\u{17e}".into())]), "{text}");
        }
        assert_eq!(metadata("p=100%25")["p"], "100%");
    }

    #[test]
    fn filters() {
        let all = vec![sandbox(1, "a"), sandbox(2, "b"), sandbox(3, "p")];
        let ids = |q: &str| -> Vec<String> {
            Query::parse(q).unwrap().page(all.clone()).0.iter().map(|s| id(&s.sandbox).to_owned()).collect()
        };
        assert_eq!(ids("metadata=k%3D1"), ["p", "a"]);
        for both in ["", "state=running&state=paused", "state=paused,running"] {
            assert_eq!(ids(both), ["p", "b", "a"]);
        }
        assert_eq!(ids("state=paused"), ["p"]);
        assert_eq!(ids("state=running"), ["b", "a"]);
        assert_eq!(ids("startedAfter=1970-01-01T00:00:02Z"), ["p", "b"]);
        for bad in [
            "limit=0",
            "limit=-1",
            "state=flying",
            "order=up",
            "startedAfter=x",
            "nextToken=x",
            "nextToken=1_%00",
        ] {
            assert_eq!(Query::parse(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
