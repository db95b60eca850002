//! How much the gateway did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One count.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn one(&self) {
        self.add(1);
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts since the start, of all sandboxes together.
        #[derive(Debug, Default)]
        pub struct Counters { $(pub $name: Counter),* }

        /// What [`Counters`] were at one time.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct CounterSnapshot { $($(#[$doc])* pub $name: u64),* }

        impl Counters {
            /// As they are now.
            pub fn snapshot(&self) -> CounterSnapshot {
                CounterSnapshot { $($name: self.$name.0.load(Relaxed)),* }
            }
        }
    };
}

counters! {
    /// Flows of TCP that were let through.
    flows_allowed,
    /// Flows that the policy refused.
    flows_denied,
    /// Flows that were allowed and could not be connected.
    flows_failed,
    /// Flows that a new policy cut.
    flows_cut,
    /// Flows over the limit of a sandbox.
    flows_over_limit,
    /// Bytes from guests, of flows that have ended.
    bytes_up,
    /// Bytes to guests, of flows that have ended.
    bytes_down,
    /// Requests in which headers were set.
    requests_changed,
    /// Requests that the policy refused.
    requests_denied,
    /// Questions that were answered.
    dns_answered,
    /// Questions that the policy refused.
    dns_refused,
    /// Questions that no resolver answered.
    dns_failed,
}
