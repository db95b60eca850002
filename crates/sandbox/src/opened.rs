//! Builds that are open, so that all who use one at a time share it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use nidus_storage::BuildId;
use parking_lot::Mutex;

use crate::OpenTemplate;

/// What is open of each build, as long as somebody uses it.
#[derive(Default)]
pub struct Opened(Mutex<HashMap<BuildId, Weak<OpenTemplate>>>);

impl Opened {
    /// The build, if somebody has it open.
    pub fn get(&self, build: BuildId) -> Option<Arc<OpenTemplate>> {
        self.0.lock().get(&build).and_then(Weak::upgrade)
    }

    /// Adds a build that was just opened. Returns the one that is to be used: another may have been
    /// faster.
    pub fn keep(&self, build: BuildId, template: Arc<OpenTemplate>) -> Arc<OpenTemplate> {
        let mut all = self.0.lock();
        all.retain(|_, t| t.strong_count() > 0);
        if let Some(first) = all.get(&build).and_then(Weak::upgrade) {
            return first;
        }
        all.insert(build, Arc::downgrade(&template));
        template
    }
}
