//! Pages that are not at hand: fetched from the source by tasks of a bounded number.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    error::HandlerError,
    recording::Recorded,
    source::{Content, Fetched, Origin, SourceError},
    vm::{Arrived, Vm, Wanted, ring},
};

/// Faults that wait for a fetch.
#[derive(Debug, Default)]
pub(super) struct Misses(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Bounded by the pages of the memory: a page is in it once (`Vm::fetching`).
    pending: VecDeque<Miss>,
    running: usize,
}

#[derive(Debug, Clone, Copy)]
struct Miss {
    page: usize,
    write: bool,
    since: std::time::Instant,
}

impl Vm {
    /// Fetches a page for a fault, unless that is under way.
    pub(super) fn missed(self: &Arc<Self>, page: usize, write: bool, since: std::time::Instant) {
        self.metrics.faults_missed.add(1);
        if self.fetching.insert(page) {
            self.misses.0.lock().pending.push_back(Miss { page, write, since });
            self.start_fetches();
        }
    }

    /// A page that was fetched for a fault has been used: the next may start.
    pub(super) fn fetch_used(self: &Arc<Self>) {
        self.misses.0.lock().running -= 1;
        self.start_fetches();
    }

    fn start_fetches(self: &Arc<Self>) {
        loop {
            let miss = {
                let mut state = self.misses.0.lock();
                if state.running >= self.config.fetches.max(1) {
                    return;
                }
                let Some(miss) = state.pending.pop_front() else { return };
                state.running += 1;
                miss
            };
            let answer = Answer { vm: self.clone(), page: miss.page, given: false };
            let task = async move {
                let cancel = answer.vm.cancel.clone();
                cancel.run_until_cancelled(answer.find(miss)).await;
            };
            self.tasks.spawn_on(task, &self.runtime);
        }
    }

    /// Fetches a page for the prefetch, in one attempt.
    pub(super) fn prefetch_missed(self: &Arc<Self>, recorded: Recorded) {
        self.prefetcher.fetch_started();
        let vm = self.clone();
        let task = async move {
            let mut attempt_over = PrefetchAttempt { vm: vm.clone(), delivered: false };
            let page = recorded.page as usize;
            let attempt = one_attempt(&vm, page, Instant::now() + vm.config.attempt_limit);
            match vm.cancel.run_until_cancelled(attempt).await {
                Some(Ok(Fetched { bytes: content, origin })) => {
                    attempt_over.delivered = true;
                    let (write, wanted) = (recorded.write, Wanted::Prefetch);
                    vm.deliver(Arrived { page, write, content, origin, wanted });
                }
                Some(Err(error)) => {
                    tracing::debug!(page, %error, "a page could not be prefetched");
                    vm.metrics.fetch_errors.add(1);
                    vm.metrics.prefetch_skipped.add(1);
                }
                None => {}
            }
        };
        self.tasks.spawn_on(task, &self.runtime);
    }
}

/// Counts an attempt that brought nothing as over, also when the source panics. One that brought a
/// page is over when that is in place.
struct PrefetchAttempt {
    vm: Arc<Vm>,
    delivered: bool,
}

impl Drop for PrefetchAttempt {
    fn drop(&mut self) {
        if !self.delivered {
            self.vm.prefetcher.fetch_ended();
            ring(&self.vm.bell);
        }
    }
}

/// The duty to answer a fault. Should the task break off, the handler ends rather than leave a
/// thread of the VM waiting for ever.
struct Answer {
    vm: Arc<Vm>,
    page: usize,
    given: bool,
}

impl Answer {
    async fn find(mut self, miss: Miss) {
        let found = fetch_with_retries(&self.vm, &miss).await;
        self.given = true;
        let Miss { page, write, since } = miss;
        let arrived =
            |content, origin| Arrived { page, write, content, origin, wanted: Wanted::Fault(since) };
        match found {
            Ok(Fetched { bytes, origin }) => self.vm.deliver(arrived(bytes, origin)),
            // The VM has given the page up meanwhile: what the source has is of no interest.
            Err(_) if self.vm.zeroed.contains(page) => {
                self.vm.deliver(arrived(Content::Zero, Origin::Cache));
            }
            Err(error) => self.vm.finish(Err(Arc::new(error))),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.given && !self.vm.cancel.is_cancelled() {
            let offset = self.vm.offset(self.page);
            self.vm.finish(Err(Arc::new(HandlerError::BrokenOff { offset })));
        }
    }
}

async fn fetch_with_retries(vm: &Vm, miss: &Miss) -> Result<Fetched, HandlerError> {
    let config = &vm.config;
    let deadline = Instant::from_std(miss.since) + config.fault_deadline;
    let mut pause = config.first_pause;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let until = deadline.min(Instant::now() + config.attempt_limit);
        let cause = match one_attempt(vm, miss.page, until).await {
            Ok(fetched) => return Ok(fetched),
            Err(cause) => cause,
        };
        vm.metrics.fetch_errors.add(1);
        let offset = vm.offset(miss.page);
        let hopeless = matches!(cause, SourceError::Permanent(_)) || attempts >= config.attempts;
        if hopeless || Instant::now() + pause >= deadline {
            return Err(HandlerError::Source { offset, attempts, waited: miss.since.elapsed(), cause });
        }
        tracing::debug!(offset, attempts, %cause, "a page could not be read; trying again");
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

async fn one_attempt(vm: &Vm, page: usize, until: Instant) -> Result<Fetched, SourceError> {
    let started = Instant::now();
    let fetched = timeout_at(until, vm.source.fetch(vm.offset(page), vm.page)).await;
    let fetched = fetched.map_err(|_| SourceError::Stalled(started.elapsed()))??;
    match &fetched.bytes {
        Content::Bytes(bytes) if bytes.len() != vm.page => {
            Err(SourceError::Short { got: bytes.len(), wanted: vm.page })
        }
        _ => Ok(fetched),
    }
}
