//! What guests say in `POST /logs` of hyperloop, on its way out of the node.
//!
//! An entry's origin (sandbox, team, template, execution) is the node's word, never the guest's; its text is
//! the guest's and hostile: control characters do not reach a terminal, and sizes are bounded before an entry
//! is made.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::events::{Event, EventKind, Sink};

/// How serious an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For those who look for a fault.
    Debug,
    /// What happens.
    Info,
    /// What should not happen.
    Warn,
    /// What failed.
    Error,
}

impl LogLevel {
    /// The level of that name, in the spellings that loggers use; `Info` of others.
    pub fn of(name: &str) -> Self {
        match name.to_ascii_lowercase().as_str() {
            "trace" | "debug" => Self::Debug,
            "warn" | "warning" => Self::Warn,
            "error" | "fatal" | "critical" | "panic" => Self::Error,
            _ => Self::Info,
        }
    }
}

/// Which sandbox says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOrigin {
    /// The sandbox.
    pub sandbox_id: String,
    /// Its team.
    pub team_id: String,
    /// Its template.
    pub template_id: String,
    /// This run of it.
    pub execution_id: String,
}

/// One entry.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestLog {
    /// When the node got it.
    pub timestamp: DateTime<Utc>,
    /// Who says it.
    pub origin: Arc<LogOrigin>,
    /// How serious it is.
    pub level: LogLevel,
    /// Its text.
    pub message: String,
    /// Everything else that came with it.
    pub fields: Map<String, Value>,
}

impl GuestLog {
    /// Bytes that it takes, about.
    pub fn size(&self) -> usize {
        let fields = self.fields.iter().map(|(name, value)| name.len() + size_of_value(value) + 64);
        128 + self.message.len() + fields.sum::<usize>()
    }
}

/// Bytes of a value on the heap, about. Nesting is bounded by the parser.
fn size_of_value(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 32,
        Value::String(text) => 32 + text.len(),
        Value::Array(all) => 32 + all.iter().map(size_of_value).sum::<usize>(),
        Value::Object(all) => 32 + all.iter().map(|(k, v)| k.len() + 64 + size_of_value(v)).sum::<usize>(),
    }
}

/// Takes entries. Returns at once; one that falls behind drops the oldest.
pub trait GuestLogSink: Send + Sync + 'static {
    /// Takes one entry.
    fn take(&self, log: &GuestLog);
}

/// Writes entries to `tracing`, target `nidus::guest`, at their level but never above INFO: what a guest
/// calls an error is not the node's.
#[derive(Debug, Default, Clone, Copy)]
pub struct TracingLogs;

impl GuestLogSink for TracingLogs {
    fn take(&self, log: &GuestLog) {
        let message: String = log.message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let sandbox = &log.origin.sandbox_id;
        match log.level {
            LogLevel::Debug => tracing::debug!(target: "nidus::guest", %sandbox, "{message}"),
            level => tracing::info!(target: "nidus::guest", %sandbox, ?level, "{message}"),
        }
    }
}

/// Keeps the newest entries of each sandbox in memory.
#[derive(Debug)]
pub struct MemoryLogs {
    limits: LogLimits,
    kept: Mutex<Kept>,
}

/// How much [`MemoryLogs`] keeps; beyond any of it the oldest go first.
#[derive(Debug, Clone, Copy)]
pub struct LogLimits {
    /// Entries of one sandbox.
    pub entries: usize,
    /// Bytes of one sandbox's entries, as [`GuestLog::size`] counts them.
    pub bytes: usize,
    /// Sandboxes.
    pub sandboxes: usize,
}

impl Default for LogLimits {
    /// 64 MiB together.
    fn default() -> Self {
        Self { entries: 1000, bytes: 256 << 10, sandboxes: 256 }
    }
}

#[derive(Debug, Default)]
struct OfSandbox {
    entries: VecDeque<GuestLog>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Kept {
    logs: HashMap<String, OfSandbox>,
    /// Sandboxes in the order of their first entry.
    order: VecDeque<String>,
}

impl MemoryLogs {
    /// Keeps so much.
    pub fn new(limits: LogLimits) -> Self {
        Self { limits, kept: Mutex::default() }
    }

    /// The kept entries of a team's sandbox, oldest first. Another team's are as unknown as none.
    pub fn of(&self, team_id: &str, sandbox_id: &str) -> Vec<GuestLog> {
        let kept = self.kept.lock();
        let all = kept.logs.get(sandbox_id).into_iter().flat_map(|of| &of.entries);
        all.filter(|log| log.origin.team_id == team_id).cloned().collect()
    }
}

impl GuestLogSink for MemoryLogs {
    fn take(&self, log: &GuestLog) {
        let size = log.size();
        if self.limits.entries == 0 || self.limits.sandboxes == 0 || size > self.limits.bytes {
            return;
        }
        let mut kept = self.kept.lock();
        let id = &log.origin.sandbox_id;
        if !kept.logs.contains_key(id) {
            if kept.order.len() >= self.limits.sandboxes
                && let Some(oldest) = kept.order.pop_front()
            {
                kept.logs.remove(&oldest);
            }
            kept.order.push_back(id.clone());
        }
        let list = kept.logs.entry(id.clone()).or_default();
        while list.entries.len() >= self.limits.entries || list.bytes + size > self.limits.bytes {
            let Some(oldest) = list.entries.pop_front() else { break };
            list.bytes -= oldest.size();
        }
        list.entries.push_back(log.clone());
        list.bytes += size;
    }
}

/// Puts the events of a sandbox's life among its log entries, in the name of the node. Why a sandbox could
/// not be made or released is the operator's to know and stays in the node's own log, and a new end time is no
/// news: every client that connects sets one.
pub struct EventLogs(Arc<dyn GuestLogSink>);

impl EventLogs {
    /// Into this sink.
    pub fn new(sink: Arc<dyn GuestLogSink>) -> Self {
        Self(sink)
    }
}

impl Sink for EventLogs {
    fn emit(&self, event: &Event) {
        if event.kind == EventKind::Updated {
            return;
        }
        let what = event.kind.name();
        let mut message = format!("Sandbox {}", what.rsplit('.').next().unwrap_or(what));
        let failed = event.kind == EventKind::Failed;
        if let Some(reason) = event.reason.as_deref().filter(|_| !failed) {
            message.push_str(": ");
            message.push_str(reason);
        }
        let fields = [("logger", "orchestrator"), ("event", what)];
        self.0.take(&GuestLog {
            timestamp: event.timestamp,
            origin: Arc::new(LogOrigin {
                sandbox_id: event.sandbox_id.clone(),
                team_id: event.team_id.clone(),
                template_id: event.template_id.clone(),
                execution_id: event.execution_id.clone(),
            }),
            level: if failed { LogLevel::Error } else { LogLevel::Info },
            message,
            fields: fields.into_iter().map(|(k, v)| (k.to_owned(), Value::from(v))).collect(),
        });
    }
}

/// Hands every entry to each of several sinks, in order.
#[derive(Default, Clone)]
pub struct LogFanout(Vec<Arc<dyn GuestLogSink>>);

impl LogFanout {
    /// A fanout to `sinks`.
    pub fn new(sinks: Vec<Arc<dyn GuestLogSink>>) -> Self {
        Self(sinks)
    }
}

impl GuestLogSink for LogFanout {
    fn take(&self, log: &GuestLog) {
        for sink in &self.0 {
            sink.take(log);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log(sandbox: usize, text: usize) -> GuestLog {
        let id = |s: &str| s.to_owned();
        let origin = LogOrigin {
            sandbox_id: sandbox.to_string(),
            team_id: id("t"),
            template_id: id("x"),
            execution_id: id("e"),
        };
        GuestLog {
            timestamp: DateTime::UNIX_EPOCH,
            origin: Arc::new(origin),
            level: LogLevel::Info,
            message: text.to_string(),
            fields: Map::new(),
        }
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_keeps_the_newest(
            entries in 1usize..5, bounded: bool, sandboxes in 1usize..4, said in prop::collection::vec(0usize..6, 0..60)
        ) {
            // A text of one or two digits, and of nothing else.
            let bytes = entries * log(0, 10).size();
            let kept = MemoryLogs::new(LogLimits { entries: if bounded { usize::MAX } else { entries }, bytes: if bounded { bytes } else { usize::MAX }, sandboxes });
            let mut order: Vec<usize> = Vec::new();
            let mut model: HashMap<usize, Vec<String>> = HashMap::new();
            for (n, s) in said.iter().enumerate().map(|(n, s)| (n + 10, s)) {
                kept.take(&log(*s, n));
                if !order.contains(s) {
                    if order.len() == sandboxes {
                        model.remove(&order.remove(0));
                    }
                    order.push(*s);
                }
                let list = model.entry(*s).or_default();
                list.push(n.to_string());
                if list.len() > entries {
                    list.remove(0);
                }
            }
            for s in 0..6 {
                let got: Vec<String> = kept.of("t", &s.to_string()).into_iter().map(|l| l.message).collect();
                prop_assert_eq!(got, model.get(&s).cloned().unwrap_or_default());
                prop_assert!(kept.of("other", &s.to_string()).is_empty());
            }
        }
    }

    #[test]
    fn what_happens_to_a_sandbox_is_among_its_logs_and_a_failures_cause_is_not() {
        let kept = Arc::new(MemoryLogs::new(LogLimits::default()));
        let logs = EventLogs::new(kept.clone());
        for kind in [EventKind::Updated, EventKind::Killed, EventKind::Failed] {
            logs.emit(&Event {
                timestamp: DateTime::UNIX_EPOCH,
                kind,
                sandbox_id: "s".into(),
                execution_id: String::new(),
                template_id: String::new(),
                build_id: String::new(),
                team_id: "t".into(),
                reason: Some("its time is over".into()),
            });
        }
        let got: Vec<(LogLevel, String)> =
            kept.of("t", "s").into_iter().map(|l| (l.level, l.message)).collect();
        let wanted =
            [(LogLevel::Info, "Sandbox killed: its time is over"), (LogLevel::Error, "Sandbox failed")];
        assert_eq!(got, wanted.map(|(level, text)| (level, text.to_owned())));
    }

    #[test]
    fn levels_in_many_spellings() {
        for (name, level) in [
            ("WARNING", LogLevel::Warn),
            ("fatal", LogLevel::Error),
            ("trace", LogLevel::Debug),
            ("", LogLevel::Info),
        ] {
            assert_eq!(LogLevel::of(name), level);
        }
    }
}
