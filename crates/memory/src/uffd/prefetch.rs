//! Pages put in place before anyone asks, in recorded order.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::recording::Recorded;

/// What is still to be prefetched. The readers take from it when no event waits.
#[derive(Debug)]
pub(super) struct Prefetcher {
    state: Mutex<State>,
    /// Whether a page could be taken now; to be asked without the lock.
    ready: AtomicBool,
    /// Fetches of pages that are not at hand: this many at once.
    max_fetches: usize,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Recorded>,
    fetches: usize,
    /// Pages that a reader has taken and not yet dealt with.
    taken: usize,
    finished: Option<watch::Sender<bool>>,
}

impl Prefetcher {
    pub(super) fn new(max_fetches: usize) -> Self {
        Self { state: Mutex::default(), ready: AtomicBool::new(false), max_fetches: max_fetches.max(1) }
    }

    /// Replaces what is left by these pages.
    pub(super) fn begin(&self, pages: impl IntoIterator<Item = Recorded>) -> Prefetch {
        let (sender, finished) = watch::channel(false);
        self.change(|state| {
            state.queue = pages.into_iter().collect();
            state.finished = Some(sender);
        });
        Prefetch { finished }
    }

    /// Whether a page could be taken now.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Takes the next page; [`done`](Self::done) must follow.
    pub(super) fn take(&self) -> Option<Recorded> {
        if !self.is_ready() {
            return None;
        }
        self.change(|state| {
            let next = if state.fetches < self.max_fetches { state.queue.pop_front() } else { None };
            state.taken += usize::from(next.is_some());
            next
        })
    }

    pub(super) fn done(&self) {
        self.change(|state| state.taken -= 1);
    }

    pub(super) fn fetch_started(&self) {
        self.change(|state| state.fetches += 1);
    }

    pub(super) fn fetch_ended(&self) {
        self.change(|state| state.fetches -= 1);
    }

    /// Drops what is left.
    pub(super) fn abandon(&self) {
        self.change(|state| {
            state.queue.clear();
            state.finished = None;
        });
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let ready = !state.queue.is_empty() && state.fetches < self.max_fetches;
        self.ready.store(ready, Ordering::Release);
        if state.queue.is_empty()
            && state.fetches == 0
            && state.taken == 0
            && let Some(finished) = state.finished.take()
        {
            finished.send_replace(true);
        }
        result
    }
}

/// A prefetch under way. Dropping it does not stop it.
#[derive(Debug)]
pub struct Prefetch {
    finished: watch::Receiver<bool>,
}

impl Prefetch {
    /// Waits until each of its pages is in place or given up: `true`. `false` if another prefetch
    /// took its place or the handler ended.
    pub async fn finished(&mut self) -> bool {
        self.finished.wait_for(|finished| *finished).await.is_ok()
    }
}

/// A recording was made of a memory of another size or page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the fault recording belongs to a memory of another size or page size")]
pub struct OtherMemory;
