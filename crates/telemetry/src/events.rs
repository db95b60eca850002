//! Life-cycle events of sandboxes and the sinks that take them.
//!
//! An emitter must never wait for a sink: [`Sink::emit`] is synchronous and has to return at once;
//! a sink that writes to a network queues internally and drops the oldest when it falls behind.

use std::collections::VecDeque;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use serde::Serialize;

/// What happened. The names in JSON are E2B's event types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum EventKind {
    /// A sandbox answers for the first time.
    #[serde(rename = "sandbox.lifecycle.created")]
    Created,
    /// It was resumed from a pause, and answers again.
    #[serde(rename = "sandbox.lifecycle.resumed")]
    Resumed,
    /// Its state was stored and everything else of it released.
    #[serde(rename = "sandbox.lifecycle.paused")]
    Paused,
    /// Its state was stored, and it runs on.
    #[serde(rename = "sandbox.lifecycle.checkpointed")]
    Checkpointed,
    /// Its end time or its network policy was changed.
    #[serde(rename = "sandbox.lifecycle.updated")]
    Updated,
    /// It ended; the reason says why.
    #[serde(rename = "sandbox.lifecycle.killed")]
    Killed,
    /// It could not be created, or could not be released cleanly.
    #[serde(rename = "sandbox.lifecycle.failed")]
    Failed,
}

impl EventKind {
    /// E2B's name of the event type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "sandbox.lifecycle.created",
            Self::Resumed => "sandbox.lifecycle.resumed",
            Self::Paused => "sandbox.lifecycle.paused",
            Self::Checkpointed => "sandbox.lifecycle.checkpointed",
            Self::Updated => "sandbox.lifecycle.updated",
            Self::Killed => "sandbox.lifecycle.killed",
            Self::Failed => "sandbox.lifecycle.failed",
        }
    }
}

/// One fact about one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When it happened, by the node's wall clock.
    pub timestamp: DateTime<Utc>,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The sandbox.
    pub sandbox_id: String,
    /// This run of the sandbox (a resumed sandbox keeps its id and gets a new execution).
    pub execution_id: String,
    /// The template it was made from.
    pub template_id: String,
    /// The build of that template.
    pub build_id: String,
    /// The team that owns it.
    pub team_id: String,
    /// Why, when there is more to say than the kind does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Takes events. Implementations return at once and never fail loudly: losing an event must not
/// hurt a sandbox.
pub trait Sink: Send + Sync + 'static {
    /// Takes one event.
    fn emit(&self, event: &Event);
}

/// Writes every event to `tracing` at level INFO (WARN for failures), target `nidus::events`.
#[derive(Debug, Default, Clone, Copy)]
pub struct LogSink;

impl Sink for LogSink {
    fn emit(&self, event: &Event) {
        let reason = event.reason.as_deref().unwrap_or("");
        match event.kind {
            EventKind::Failed => tracing::warn!(
                target: "nidus::events", event = event.kind.name(), sandbox = %event.sandbox_id,
                execution = %event.execution_id, template = %event.template_id,
                build = %event.build_id, reason
            ),
            _ => tracing::info!(
                target: "nidus::events", event = event.kind.name(), sandbox = %event.sandbox_id,
                execution = %event.execution_id, template = %event.template_id,
                build = %event.build_id, reason
            ),
        }
    }
}

/// Keeps the newest events in memory, for inspection and for tests.
#[derive(Debug)]
pub struct MemorySink {
    capacity: usize,
    events: Mutex<VecDeque<Event>>,
}

impl MemorySink {
    /// Keeps at most `capacity` events; the oldest go first.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, events: Mutex::new(VecDeque::new()) }
    }

    /// The kept events, oldest first.
    pub fn snapshot(&self) -> Vec<Event> {
        self.events.lock().iter().cloned().collect()
    }
}

impl Sink for MemorySink {
    fn emit(&self, event: &Event) {
        if self.capacity == 0 {
            return;
        }
        let mut events = self.events.lock();
        while events.len() >= self.capacity {
            events.pop_front();
        }
        events.push_back(event.clone());
    }
}

/// Hands every event to each of several sinks, in order.
#[derive(Default, Clone)]
pub struct Fanout {
    sinks: Vec<Arc<dyn Sink>>,
}

impl Fanout {
    /// A fanout to `sinks`.
    pub fn new(sinks: Vec<Arc<dyn Sink>>) -> Self {
        Self { sinks }
    }
}

impl Sink for Fanout {
    fn emit(&self, event: &Event) {
        for sink in &self.sinks {
            sink.emit(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(sandbox: &str, kind: EventKind) -> Event {
        Event {
            timestamp: DateTime::UNIX_EPOCH,
            kind,
            sandbox_id: sandbox.to_owned(),
            execution_id: "x".to_owned(),
            template_id: "t".to_owned(),
            build_id: "b".to_owned(),
            team_id: String::new(),
            reason: None,
        }
    }

    proptest! {
        #[test]
        fn memory_keeps_the_newest_in_order(capacity in 0usize..8, total in 0usize..30) {
            let sink = MemorySink::new(capacity);
            for n in 0..total {
                sink.emit(&event(&n.to_string(), EventKind::Created));
            }
            let kept: Vec<String> = sink.snapshot().into_iter().map(|e| e.sandbox_id).collect();
            let expected: Vec<String> =
                (total.saturating_sub(capacity)..total).map(|n| n.to_string()).collect();
            prop_assert_eq!(kept, expected);
        }
    }

    #[test]
    fn a_fanout_reaches_every_sink() {
        let (one, two) = (Arc::new(MemorySink::new(4)), Arc::new(MemorySink::new(4)));
        Fanout::new(vec![one.clone(), two.clone()]).emit(&event("a", EventKind::Killed));
        assert_eq!(one.snapshot(), two.snapshot());
        assert_eq!(one.snapshot().len(), 1);
    }

    #[test]
    fn json_and_name_agree() {
        for kind in [
            EventKind::Created,
            EventKind::Resumed,
            EventKind::Paused,
            EventKind::Updated,
            EventKind::Killed,
            EventKind::Failed,
        ] {
            let json = serde_json::to_value(event("a", kind)).unwrap();
            assert_eq!(json["type"], kind.name());
            assert_eq!(json["sandboxId"], "a");
            assert!(json.get("reason").is_none());
        }
    }
}
