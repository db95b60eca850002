//! Counts of what a handler did.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters, written by several threads.
        #[derive(Debug, Default)]
        pub(super) struct Metrics {
            $(pub(super) $name: Counter,)*
        }

        /// What a handler has done so far. Each number is right by itself; together they are not
        /// of one instant.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct MetricsSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Metrics {
            pub(super) fn snapshot(&self) -> MetricsSnapshot {
                MetricsSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

metrics! {
    /// Faults answered with bytes that were on this machine.
    faults_cache,
    /// Faults answered with bytes from storage.
    faults_storage,
    /// Faults answered with zeros.
    faults_zero,
    /// Faults on pages that were there when the answer came: another thread's fault or the
    /// prefetch had brought them.
    faults_repeated,
    /// Faults that waited for a fetch.
    faults_missed,
    /// Faults on write-protected pages.
    faults_protected,
    /// Faults on addresses that are mapped or registered no more.
    faults_gone,
    /// The time from reading a fault's event to its answer, summed, in nanoseconds, by source.
    latency_cache_ns,
    /// As above, for storage.
    latency_storage_ns,
    /// As above, for zeros.
    latency_zero_ns,
    /// Pages put in place by the prefetch.
    prefetched,
    /// Pages of a recording that were there already, or could not be fetched now.
    prefetch_skipped,
    /// Pages put in place beside a faulting one.
    around,
    /// Events of removed pages.
    removes,
    /// Pages in those.
    removed_pages,
    /// Answers that had to be put off because the process was changing its mappings.
    put_off,
    /// Attempts to fetch a page that failed, were short or stalled.
    fetch_errors,
    /// Bytes copied into the VM, zeros not counted.
    bytes_copied,
    /// Pages saved for a live snapshot because the VM wanted to write to them.
    saved_on_write,
    /// Pages saved for a live snapshot by the sweep.
    saved_by_sweep,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add_time(&self, time: Duration) {
        self.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}
