//! How much the gateway did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts since the start, of all sandboxes together.
        #[derive(Debug, Default)]
        pub struct Counters { $($name: AtomicU64),* }

        /// What [`Counters`] were at one time.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct CounterSnapshot { $($(#[$doc])* pub $name: u64),* }

        impl Counters {
            /// As they are now.
            pub fn snapshot(&self) -> CounterSnapshot {
                CounterSnapshot { $($name: self.$name.load(Relaxed)),* }
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

impl Counters {
    pub(crate) fn allowed(&self) {
        self.flows_allowed.fetch_add(1, Relaxed);
    }

    pub(crate) fn denied(&self) {
        self.flows_denied.fetch_add(1, Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.flows_failed.fetch_add(1, Relaxed);
    }

    pub(crate) fn cut(&self) {
        self.flows_cut.fetch_add(1, Relaxed);
    }

    pub(crate) fn over_limit(&self) {
        self.flows_over_limit.fetch_add(1, Relaxed);
    }

    pub(crate) fn carried(&self, up: u64, down: u64) {
        self.bytes_up.fetch_add(up, Relaxed);
        self.bytes_down.fetch_add(down, Relaxed);
    }

    pub(crate) fn request_changed(&self) {
        self.requests_changed.fetch_add(1, Relaxed);
    }

    pub(crate) fn request_denied(&self) {
        self.requests_denied.fetch_add(1, Relaxed);
    }

    pub(crate) fn answered(&self) {
        self.dns_answered.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self) {
        self.dns_refused.fetch_add(1, Relaxed);
    }

    pub(crate) fn unanswered(&self) {
        self.dns_failed.fetch_add(1, Relaxed);
    }
}
