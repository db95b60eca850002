//! The template cache: templates stay open for some time after their last use, or for good.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nidus_storage::BuildId;
use parking_lot::Mutex;

use crate::OpenTemplate;

/// Open templates. Those who use one share it, and have it for as long as they need it.
pub struct Cached<T = OpenTemplate> {
    ttl: Duration,
    /// Held by those who open one, so that each is opened once.
    pub opening: tokio::sync::Mutex<()>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Each with the time from which it may be closed.
    open: HashMap<BuildId, (Arc<T>, Instant)>,
    /// These are not closed.
    pinned: HashSet<BuildId>,
}

impl<T> Cached<T> {
    /// An empty cache whose templates stay for `ttl` after their last use.
    pub fn new(ttl: Duration) -> Self {
        let state = Mutex::new(State { open: HashMap::new(), pinned: HashSet::new() });
        Self { ttl, opening: Default::default(), state }
    }

    /// The template, if it is open; this is a use of it.
    pub fn get(&self, build: BuildId) -> Option<Arc<T>> {
        let mut state = self.state.lock();
        let (template, until) = state.open.get_mut(&build)?;
        *until = Instant::now() + self.ttl;
        Some(template.clone())
    }

    /// Keeps a template that was just opened.
    pub fn keep(&self, build: BuildId, template: Arc<T>) {
        self.state.lock().open.insert(build, (template, Instant::now() + self.ttl));
    }

    /// Forgets a build, such as one that was deleted.
    pub fn forget(&self, build: BuildId) {
        let closed = self.state.lock().open.remove(&build);
        // Not under the lock: it closes files.
        drop(closed);
    }

    /// Which templates are not closed, in place of those of before.
    pub fn pin(&self, builds: HashSet<BuildId>) {
        self.state.lock().pinned = builds;
    }

    /// Takes out the templates whose time is over; for those that are pinned or in use it begins anew.
    /// Also says how long nothing will be to be done.
    pub fn expired(&self, in_use: impl Fn(BuildId) -> bool) -> (Vec<(BuildId, Arc<T>)>, Duration) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let State { open, pinned } = &mut *state;
        for (build, (_, until)) in open.iter_mut().filter(|(_, (_, until))| *until <= now) {
            if pinned.contains(build) || in_use(*build) {
                *until = now + self.ttl;
            }
        }
        let closed = open.extract_if(|_, (_, until)| *until <= now).map(|(b, (t, _))| (b, t)).collect();
        let wait = open.values().map(|(_, until)| *until - now).min().unwrap_or(self.ttl);
        (closed, wait)
    }

    /// What is open, each with the time that it stays at least.
    pub fn list(&self, in_use: impl Fn(BuildId) -> bool) -> Vec<(BuildId, Duration)> {
        let now = Instant::now();
        let state = self.state.lock();
        let left = |build, until: Instant| match state.pinned.contains(build) || in_use(*build) {
            true => self.ttl,
            false => until.saturating_duration_since(now),
        };
        state.open.iter().map(|(b, (_, until))| (*b, left(b, *until))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_millis(300);

    fn ids(closed: Vec<(BuildId, Arc<()>)>) -> HashSet<BuildId> {
        closed.into_iter().map(|(b, _)| b).collect()
    }

    #[test]
    fn a_template_stays_for_its_time_after_its_last_use() {
        let cached = Cached::new(TTL);
        let [idle, used, running, pinned] = [(); 4].map(|()| BuildId::random());
        cached.pin([pinned].into());
        let began = Instant::now();
        for build in [idle, used, running, pinned] {
            cached.keep(build, Arc::new(()));
        }
        let (closed, wait) = cached.expired(|_| false);
        assert!(began.elapsed() >= TTL || (closed.is_empty() && wait <= TTL));
        // All have been kept by now: when this is over, so is the time of each.
        let kept = Instant::now();
        let mut last_use = began;
        while kept.elapsed() <= TTL {
            last_use = Instant::now();
            assert!(cached.get(used).is_some());
            std::thread::yield_now();
        }
        let closed = ids(cached.expired(|b| b == running).0);
        assert!(closed.contains(&idle) && !closed.contains(&running) && !closed.contains(&pinned));
        assert!(last_use.elapsed() >= TTL || !closed.contains(&used));
        // What is in use and what is pinned have all of their time before them.
        let left: HashMap<_, _> = cached.list(|b| b == running).into_iter().collect();
        assert_eq!((left[&running], left[&pinned], left.contains_key(&idle)), (TTL, TTL, false));
        cached.pin(HashSet::new());
        std::thread::sleep(TTL);
        assert!(cached.list(|_| false).iter().all(|(_, left)| left.is_zero()));
        assert!(ids(cached.expired(|_| false).0).is_superset(&[running, pinned].into()));
        assert!(cached.list(|_| false).is_empty());
    }

    #[test]
    fn what_is_closed_is_open_for_those_who_use_it() {
        let cached = Cached::new(TTL);
        let build = BuildId::random();
        cached.keep(build, Arc::new(7));
        let mine = cached.get(build).unwrap();
        cached.forget(build);
        assert!(cached.get(build).is_none());
        assert_eq!(*mine, 7);
    }
}
