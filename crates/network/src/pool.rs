//! Slots made ahead of need.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::nfnl::Netfilter;
use crate::slot::{NetworkConfig, NetworkSlot};
use crate::{NetworkError, firewall, link, netns_dir};

/// When nobody took a slot for this long, those over the target go.
const REST: Duration = Duration::from_secs(2);
/// How often one of the slots that stand ready is looked at, while nothing else is to be done.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// Counters of a pool.
#[derive(Debug, Default)]
pub struct PoolStats {
    /// Slots made.
    pub created: AtomicU64,
    /// Slots that were cleaned and found clean after a tenant, for the next one.
    pub reused: AtomicU64,
    /// Slots that were not clean, or were damaged while they stood ready.
    pub unclean: AtomicU64,
    /// Slots destroyed.
    pub destroyed: AtomicU64,
    /// Attempts to make one that failed.
    pub failed: AtomicU64,
}

/// Keeps `target` slots ready. A released slot is cleaned, and what it was when it was made is checked; one that
/// is not clean is destroyed, and another is made in its place. The one that was unused for longest comes first.
/// While they come and go there may be twice as many ready, so that few are made.
pub struct Pool {
    inner: Arc<Inner>,
    task: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    config: NetworkConfig,
    target: usize,
    state: Mutex<State>,
    /// Of the host's own namespace.
    netfilter: Arc<Mutex<Netfilter>>,
    /// A slot became ready, an index free, or an attempt failed.
    ready: Notify,
    /// The maker has something to look at.
    wanted: Notify,
    closed: AtomicBool,
    stats: PoolStats,
}

struct State {
    slots: VecDeque<NetworkSlot>,
    /// Free indices; the one longest unused first, so that late packets find nobody.
    free: VecDeque<u32>,
    waiting: usize,
    last_error: Option<NetworkError>,
}

impl Pool {
    /// Applies the host's rules, turns forwarding on and starts making slots. `reclaim` first.
    ///
    /// # Errors
    /// When the configuration is wrong or the host's rules cannot be set.
    pub async fn start(config: NetworkConfig, target: usize) -> Result<Self, NetworkError> {
        config.check()?;
        let c = config.clone();
        let netfilter = blocking(move || {
            netns_dir::prepare()?;
            firewall::apply(&c.table, &firewall::host_rules(&c))?;
            let path = "/proc/sys/net/ipv4/ip_forward";
            std::fs::write(path, "1").map_err(|e| NetworkError::io(format!("turn on {path}"), e))?;
            Netfilter::open()
        })
        .await?;
        let state =
            State { slots: VecDeque::new(), free: config.indices().collect(), waiting: 0, last_error: None };
        let inner = Arc::new(Inner {
            config,
            target,
            state: Mutex::new(state),
            netfilter: Arc::new(Mutex::new(netfilter)),
            ready: Notify::new(),
            wanted: Notify::new(),
            closed: AtomicBool::new(false),
            stats: PoolStats::default(),
        });
        let task = tokio::spawn(inner.clone().keep());
        Ok(Self { inner, task: Mutex::new(Some(task)) })
    }

    /// Takes a ready slot or waits for one to be made.
    ///
    /// # Errors
    /// [`NetworkError::Exhausted`] when all are in use; the cause when none can be made.
    pub async fn acquire(&self) -> Result<NetworkSlot, NetworkError> {
        let inner = &self.inner;
        let _waiting = Waiting::new(inner);
        loop {
            let ready = inner.ready.notified();
            tokio::pin!(ready);
            ready.as_mut().enable();
            {
                let mut s = inner.state.lock();
                if let Some(slot) = s.slots.pop_front() {
                    inner.wanted.notify_one();
                    return Ok(slot);
                }
                if inner.closed.load(Relaxed) {
                    return Err(NetworkError::Closed);
                }
                if let Some(e) = s.last_error.take() {
                    return Err(e);
                }
                let used = inner.stats.created.load(Relaxed) - inner.stats.destroyed.load(Relaxed);
                if s.free.is_empty() && used >= u64::from(inner.config.max_slots) {
                    return Err(NetworkError::Exhausted(inner.config.max_slots));
                }
            }
            inner.wanted.notify_one();
            ready.await;
        }
    }

    /// Takes a slot back: for the next tenant if it can be made as it was and there is room, else it is destroyed.
    pub async fn release(&self, slot: NetworkSlot) {
        self.inner.give_back(slot).await;
    }

    /// Counters.
    pub fn stats(&self) -> &PoolStats {
        &self.inner.stats
    }

    /// How many slots are ready now.
    pub fn ready(&self) -> usize {
        self.inner.state.lock().slots.len()
    }

    /// Destroys the ready slots and removes the host's rules. Slots in use must have been
    /// released before.
    pub async fn shutdown(&self) {
        self.inner.closed.store(true, Relaxed);
        self.inner.wanted.notify_one();
        self.inner.ready.notify_waiters();
        let task = self.task.lock().take();
        if let Some(task) = task {
            let _ = task.await;
        }
        let slots: Vec<_> = self.inner.state.lock().slots.drain(..).collect();
        for slot in slots {
            self.inner.destroy(slot).await;
        }
        let table = self.inner.config.table.clone();
        let removed = blocking(move || {
            netns_dir::release();
            firewall::remove_table(&table)
        });
        if let Err(e) = removed.await {
            tracing::warn!("while the network pool was shut down: {e}");
        }
    }
}

/// Counts a caller that waits, also when it goes away.
struct Waiting<'a>(&'a Inner);

impl<'a> Waiting<'a> {
    fn new(inner: &'a Inner) -> Self {
        inner.state.lock().waiting += 1;
        Self(inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl Inner {
    fn next_index(&self) -> Option<u32> {
        let mut s = self.state.lock();
        let goal = self.target.max(s.waiting);
        if s.slots.len() < goal { s.free.pop_front() } else { None }
    }

    async fn keep(self: Arc<Self>) {
        let (mut pause, mut looked) = (Duration::ZERO, Instant::now());
        while !self.closed.load(Relaxed) {
            let Some(index) = self.next_index() else {
                if tokio::time::timeout(REST, self.wanted.notified()).await.is_err() {
                    self.trim().await;
                    if looked.elapsed() >= CHECK_EVERY {
                        looked = Instant::now();
                        self.check_one().await;
                    }
                }
                continue;
            };
            let config = self.config.clone();
            let made = blocking(move || NetworkSlot::create(&config, index)).await;
            match made {
                Ok(slot) => {
                    pause = Duration::ZERO;
                    self.stats.created.fetch_add(1, Relaxed);
                    let mut s = self.state.lock();
                    s.last_error = None;
                    s.slots.push_back(slot);
                }
                Err(e) => {
                    self.stats.failed.fetch_add(1, Relaxed);
                    pause = (pause * 2).clamp(Duration::from_millis(50), Duration::from_secs(5));
                    tracing::warn!(index, retry_in = ?pause, "cannot make a network slot: {e}");
                    // The next index is tried next: this one may be held by something foreign.
                    let veth = self.config.addresses(index).veth;
                    let _ = blocking(move || link::remove_veth(&veth)).await;
                    let mut s = self.state.lock();
                    s.free.push_back(index);
                    s.last_error = (s.waiting > 0).then_some(e);
                }
            }
            self.ready.notify_waiters();
            if !pause.is_zero() {
                let _ = tokio::time::timeout(pause, self.wanted.notified()).await;
            }
        }
    }

    fn has_room(&self) -> bool {
        let s = self.state.lock();
        !self.closed.load(Relaxed) && s.slots.len() < (2 * self.target).max(s.waiting)
    }

    async fn give_back(&self, slot: NetworkSlot) {
        if !self.has_room() {
            return self.destroy(slot).await;
        }
        let index = slot.index();
        let netfilter = self.netfilter.clone();
        // Dropped with its namespace if it is not clean.
        match blocking(move || slot.clean(&netfilter)).await {
            Ok(slot) => {
                let refused = {
                    let mut s = self.state.lock();
                    if self.closed.load(Relaxed) {
                        Some(slot)
                    } else {
                        s.slots.push_back(slot);
                        None
                    }
                };
                match refused {
                    Some(slot) => self.destroy(slot).await,
                    None => {
                        self.stats.reused.fetch_add(1, Relaxed);
                        self.ready.notify_waiters();
                    }
                }
            }
            Err(e) => self.tear_down(index, &e).await,
        }
    }

    /// A slot that is not as it was; it has been dropped.
    async fn tear_down(&self, index: u32, why: &NetworkError) {
        tracing::warn!(index, "a network slot is torn down: {why}");
        self.stats.unclean.fetch_add(1, Relaxed);
        self.remove(index, None).await;
    }

    /// Destroys the slots that are more than the target.
    async fn trim(&self) {
        loop {
            let surplus = {
                let mut s = self.state.lock();
                if s.slots.len() > self.target.max(s.waiting) { s.slots.pop_front() } else { None }
            };
            match surplus {
                Some(slot) => self.destroy(slot).await,
                None => return,
            }
        }
    }

    /// Looks at the slot that was ready for longest, and tears it down if it was damaged.
    async fn check_one(&self) {
        let slot = self.state.lock().slots.pop_front();
        let Some(slot) = slot else { return };
        let index = slot.index();
        match blocking(move || slot.check().map(|()| slot)).await {
            Ok(slot) => {
                self.state.lock().slots.push_back(slot);
                self.ready.notify_waiters();
            }
            Err(e) => self.tear_down(index, &e).await,
        }
    }

    async fn destroy(&self, slot: NetworkSlot) {
        self.remove(slot.index(), Some(slot)).await;
    }

    /// Removes a slot, if that has not been dropped yet, and what is outside of its namespace.
    async fn remove(&self, index: u32, slot: Option<NetworkSlot>) {
        let a = self.config.addresses(index);
        let netfilter = self.netfilter.clone();
        let removed = blocking(move || {
            drop(slot);
            // The kernel destroys a namespace when it likes; the name is wanted now.
            link::remove_veth(&a.veth)?;
            // The address will be another tenant's.
            netfilter.lock().forget(a.host_ip)
        });
        if let Err(e) = removed.await {
            tracing::warn!(index, "while a network slot was destroyed: {e}");
        }
        self.stats.destroyed.fetch_add(1, Relaxed);
        self.state.lock().free.push_back(index);
        self.wanted.notify_one();
        self.ready.notify_waiters();
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| NetworkError::io("finish a network operation", std::io::Error::other(e)))?
}
