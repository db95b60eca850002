//! Builds that are open, so that all who use one at a time share it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use nidus_storage::BuildId;
use parking_lot::Mutex;

use crate::OpenTemplate;
use crate::template::Start;

/// What is open of each build, as long as somebody uses it.
#[derive(Default)]
pub struct Opened(Mutex<HashMap<(BuildId, Start), Weak<OpenTemplate>>>);

impl Opened {
    /// The build, if somebody has it open.
    pub fn get(&self, build: BuildId, start: Start) -> Option<Arc<OpenTemplate>> {
        self.0.lock().get(&(build, start)).and_then(Weak::upgrade)
    }

    /// Whether somebody has the build open.
    pub fn has(&self, build: BuildId) -> bool {
        [Start::Restore, Start::Boot].into_iter().any(|start| self.get(build, start).is_some())
    }

    /// Adds a build that was just opened. Returns the one that is to be used: another may have been
    /// faster.
    pub fn keep(&self, build: BuildId, template: Arc<OpenTemplate>) -> Arc<OpenTemplate> {
        let mut all = self.0.lock();
        all.retain(|_, t| t.strong_count() > 0);
        let key = (build, template.start);
        if let Some(first) = all.get(&key).and_then(Weak::upgrade) {
            return first;
        }
        all.insert(key, Arc::downgrade(&template));
        template
    }
}
