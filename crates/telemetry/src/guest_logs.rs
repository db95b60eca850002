//! What guests say in `POST /logs` of hyperloop, on its way out of the node.
//!
//! An entry's origin (sandbox, team, template, execution) is the node's word, never the guest's; its text is
//! the guest's and hostile: control characters do not reach a terminal, and sizes are bounded before an entry
//! is made.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use serde_json::{Map, Value};

/// How serious an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
    entries: usize,
    sandboxes: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    logs: HashMap<String, VecDeque<GuestLog>>,
    /// Sandboxes in the order of their first entry.
    order: VecDeque<String>,
}

impl MemoryLogs {
    /// Keeps at most `entries` of each of at most `sandboxes` sandboxes; the oldest go first.
    pub fn new(entries: usize, sandboxes: usize) -> Self {
        Self { entries, sandboxes, kept: Mutex::default() }
    }

    /// The kept entries of a sandbox, oldest first.
    pub fn of(&self, sandbox_id: &str) -> Vec<GuestLog> {
        self.kept.lock().logs.get(sandbox_id).into_iter().flatten().cloned().collect()
    }
}

impl GuestLogSink for MemoryLogs {
    fn take(&self, log: &GuestLog) {
        if self.entries == 0 || self.sandboxes == 0 {
            return;
        }
        let mut kept = self.kept.lock();
        let id = &log.origin.sandbox_id;
        if !kept.logs.contains_key(id) {
            if kept.order.len() >= self.sandboxes
                && let Some(oldest) = kept.order.pop_front()
            {
                kept.logs.remove(&oldest);
            }
            kept.order.push_back(id.clone());
        }
        let list = kept.logs.entry(id.clone()).or_default();
        if list.len() >= self.entries {
            list.pop_front();
        }
        list.push_back(log.clone());
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
            entries in 1usize..5, sandboxes in 1usize..4, said in prop::collection::vec(0usize..6, 0..60)
        ) {
            let kept = MemoryLogs::new(entries, sandboxes);
            let mut order: Vec<usize> = Vec::new();
            let mut model: HashMap<usize, Vec<String>> = HashMap::new();
            for (n, s) in said.iter().enumerate() {
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
                let got: Vec<String> = kept.of(&s.to_string()).into_iter().map(|l| l.message).collect();
                prop_assert_eq!(got, model.get(&s).cloned().unwrap_or_default());
            }
        }
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
