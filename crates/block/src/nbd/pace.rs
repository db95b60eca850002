//! Whether a connection's thread writes itself.

use std::time::{Duration, Instant};

/// Notices when the kernel holds writers up.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Until then the thread leaves writes to others.
    elsewhere_until: Option<Instant>,
}

impl Pace {
    /// A write to the page cache takes microseconds, and a few milliseconds when the thread has to wait
    /// for a processor in its middle. One that takes longer was held up.
    const HELD_UP: Duration = Duration::from_millis(10);
    const ELSEWHERE: Duration = Duration::from_millis(100);

    /// Whether the thread should write itself.
    pub(super) fn inline(&self, now: Instant) -> bool {
        self.elsewhere_until.is_none_or(|until| now >= until)
    }

    /// Runs a write.
    pub(super) fn time<T>(&mut self, write: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = write();
        self.note(begin, Instant::now());
        result
    }

    fn note(&mut self, begin: Instant, end: Instant) {
        if end - begin > Self::HELD_UP {
            self.elsewhere_until = Some(end + Self::ELSEWHERE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_write_that_was_held_up_others_write_for_a_while() {
        let (start, ms) = (Instant::now(), Duration::from_millis(1));
        let mut pace = Pace::default();
        pace.note(start, start + 9 * ms);
        assert!(pace.inline(start + 9 * ms));
        pace.note(start, start + 11 * ms);
        assert!(!pace.inline(start + 11 * ms) && !pace.inline(start + 110 * ms));
        assert!(pace.inline(start + 111 * ms));
    }
}
