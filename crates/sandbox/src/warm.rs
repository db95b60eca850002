//! Machines made ahead of need, per template.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nidus_storage::BuildId;
use parking_lot::Mutex;

use crate::machine::Machine;

/// Counters of the warm set.
#[derive(Debug, Default)]
pub struct WarmStats {
    /// Sandboxes that found a machine ready.
    pub hits: AtomicU64,
    /// Sandboxes whose machine had to be made on request.
    pub misses: AtomicU64,
}

/// Ready machines and the builds that are to be kept ready, most recently used first.
#[derive(Default)]
pub struct WarmSet {
    state: Mutex<State>,
    /// Counters.
    pub stats: WarmStats,
}

#[derive(Default)]
struct State {
    machines: HashMap<BuildId, VecDeque<Machine>>,
    wanted: VecDeque<BuildId>,
    closed: bool,
}

/// How many templates are kept warm at once; the least recently used one gives way.
const MAX_BUILDS: usize = 4;

impl WarmSet {
    /// Takes a machine whose VMM is alive. Dead ones come back in `dead`, to be released.
    pub fn take(&self, build: BuildId, dead: &mut Vec<Machine>) -> Option<Machine> {
        let mut s = self.state.lock();
        let found = loop {
            match s.machines.get_mut(&build).and_then(VecDeque::pop_front) {
                Some(m) if m.exit().status().is_some() => dead.push(m),
                other => break other,
            }
        };
        let counter = if found.is_some() { &self.stats.hits } else { &self.stats.misses };
        counter.fetch_add(1, Relaxed);
        found
    }

    /// Marks a build as wanted; returns machines of builds that give way.
    pub fn want(&self, build: BuildId) -> Vec<Machine> {
        let mut s = self.state.lock();
        s.wanted.retain(|b| *b != build);
        s.wanted.push_front(build);
        let mut out = Vec::new();
        while s.wanted.len() > MAX_BUILDS {
            if let Some(old) = s.wanted.pop_back() {
                out.extend(s.machines.remove(&old).into_iter().flatten());
            }
        }
        out
    }

    /// Forgets a build (it cannot be opened, or was deleted) and returns its machines.
    pub fn forget(&self, build: BuildId) -> Vec<Machine> {
        let mut s = self.state.lock();
        s.wanted.retain(|b| *b != build);
        s.machines.remove(&build).into_iter().flatten().collect()
    }

    /// The first wanted build that has fewer than `target` machines.
    pub fn lacking(&self, target: usize) -> Option<BuildId> {
        let s = self.state.lock();
        if s.closed {
            return None;
        }
        s.wanted.iter().find(|b| s.machines.get(b).map_or(0, VecDeque::len) < target).copied()
    }

    /// How many machines of a build stand ready.
    pub fn count(&self, build: BuildId) -> usize {
        self.state.lock().machines.get(&build).map_or(0, VecDeque::len)
    }

    /// Adds a machine; it comes back when its build is not wanted any more.
    pub fn put(&self, build: BuildId, machine: Machine) -> Option<Machine> {
        let mut s = self.state.lock();
        if s.closed || !s.wanted.contains(&build) {
            return Some(machine);
        }
        s.machines.entry(build).or_default().push_back(machine);
        None
    }

    /// Takes everything out, for good.
    pub fn close(&self) -> Vec<Machine> {
        let mut s = self.state.lock();
        s.closed = true;
        s.wanted.clear();
        s.machines.drain().flat_map(|(_, m)| m).collect()
    }
}
