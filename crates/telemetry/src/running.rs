//! Which sandboxes run, kept in files: after a daemon that was killed, the next one tells what was
//! lost with it.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::{fs, io};

use chrono::Utc;

use crate::events::{Event, EventKind, Sink};

/// Why a sandbox ended of which only its file was left.
const LOST: &str = "the daemon was killed while it ran: what was not stored of it is lost";

/// Keeps a file for each sandbox that runs, written and removed by a thread of its own.
#[derive(Debug)]
pub struct RunningSink {
    changes: Option<mpsc::Sender<Event>>,
    writer: Option<JoinHandle<()>>,
}

impl RunningSink {
    /// Uses this directory, which is made if it is absent. Answers the ends of those sandboxes that an
    /// earlier daemon left in it, to be emitted here too: until then they are in it. Blocks.
    ///
    /// # Errors
    /// When the directory or a file of it cannot be made, read or removed.
    pub fn open(dir: &Path) -> io::Result<(Self, Vec<Event>)> {
        fs::create_dir_all(dir)?;
        let mut lost = Vec::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match serde_json::from_slice::<Event>(&fs::read(&path)?) {
                Ok(began) => lost.push(Event {
                    timestamp: Utc::now(),
                    kind: EventKind::Killed,
                    reason: Some(LOST.to_owned()),
                    ..began
                }),
                Err(e) => {
                    // It was being written.
                    tracing::warn!("a sandbox that had just started is lost: {}: {e}", path.display());
                    fs::remove_file(&path)?;
                }
            }
        }
        let (changes, queue) = mpsc::channel();
        let dir = dir.to_owned();
        let writer = std::thread::Builder::new().name("running".to_owned()).spawn(move || {
            for event in queue {
                if let Err(e) = apply(&dir, &event) {
                    tracing::warn!(sandbox = event.sandbox_id, "which sandboxes run could not be kept: {e}");
                }
            }
        })?;
        Ok((Self { changes: Some(changes), writer: Some(writer) }, lost))
    }
}

fn apply(dir: &Path, event: &Event) -> io::Result<()> {
    let path = file(dir, event);
    match event.kind {
        EventKind::Created | EventKind::Resumed => fs::write(path, serde_json::to_vec(event)?),
        EventKind::Paused | EventKind::Killed => fs::remove_file(path),
        EventKind::Checkpointed | EventKind::Updated | EventKind::Failed => Ok(()),
    }
}

/// Ids are the callers': none leads out of the directory.
fn file(dir: &Path, event: &Event) -> PathBuf {
    dir.join(event.sandbox_id.replace('/', "_") + ".json")
}

impl Sink for RunningSink {
    fn emit(&self, event: &Event) {
        if let Some(changes) = &self.changes {
            // The thread ends only with this.
            let _ = changes.send(event.clone());
        }
    }
}

impl Drop for RunningSink {
    fn drop(&mut self) {
        self.changes = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn event(sandbox: &str, kind: EventKind) -> Event {
        Event {
            timestamp: DateTime::UNIX_EPOCH,
            kind,
            sandbox_id: sandbox.to_owned(),
            execution_id: format!("run of {sandbox}"),
            template_id: "t".to_owned(),
            build_id: "b".to_owned(),
            team_id: "team".to_owned(),
            reason: None,
        }
    }

    #[test]
    fn those_that_ran_are_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("running");
        let (sink, lost) = RunningSink::open(&dir).unwrap();
        assert!(lost.is_empty());
        for (sandbox, kind) in [
            ("killed", EventKind::Created),
            ("paused", EventKind::Created),
            ("runs", EventKind::Created),
            ("../runs", EventKind::Resumed),
            ("killed", EventKind::Killed),
            ("paused", EventKind::Paused),
            ("runs", EventKind::Checkpointed),
            ("never", EventKind::Failed),
        ] {
            sink.emit(&event(sandbox, kind));
        }
        drop(sink);
        fs::write(dir.join("torn.json"), "{").unwrap();
        let (sink, mut lost) = RunningSink::open(&dir).unwrap();
        lost.sort_by(|a, b| a.sandbox_id.cmp(&b.sandbox_id));
        let ids: Vec<_> = lost.iter().map(|e| (e.sandbox_id.as_str(), e.execution_id.as_str())).collect();
        assert_eq!(ids, [("../runs", "run of ../runs"), ("runs", "run of runs")]);
        assert!(lost.iter().all(|e| e.kind == EventKind::Killed && e.reason.as_deref() == Some(LOST)));
        sink.emit(&lost[0]);
        drop(sink);
        let (sink, left) = RunningSink::open(&dir).unwrap();
        assert_eq!(left[..], [Event { timestamp: left[0].timestamp, ..lost[1].clone() }]);
        sink.emit(&left[0]);
        drop(sink);
        assert!(RunningSink::open(&dir).unwrap().1.is_empty());
    }
}
