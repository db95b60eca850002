//! How a connection's thread waits for the next request.

use std::time::Duration;

/// Keeps the thread awake while requests come in quick succession.
///
/// A client with one request in flight sends the next one a few microseconds after an answer. Where that
/// finds the thread asleep, a processor may have to be woken, which takes longer than the request. So a
/// thread that has seen two such requests in a row looks for the next one for a moment before it sleeps;
/// once in vain, it sleeps at once until it has seen two more.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// How many requests in a row came quickly.
    quick: u8,
}

impl Patience {
    /// The longest time between an answer and the next request that is worth staying awake for: it holds
    /// the waking of both sides.
    const QUICK: Duration = Duration::from_micros(100);
    const ENOUGH: u8 = 2;

    /// Whether to look once more, after having waited for `waited`.
    pub(super) fn lasts(&self, waited: Duration) -> bool {
        self.quick >= Self::ENOUGH && waited < Self::QUICK
    }

    /// A request came after `waited`.
    pub(super) fn note(&mut self, waited: Duration) {
        self.quick = if waited < Self::QUICK { (self.quick + 1).min(Self::ENOUGH) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lasts_only_while_requests_come_quickly() {
        let (soon, late) = (Patience::QUICK / 2, Patience::QUICK);
        let mut patience = Patience::default();
        patience.note(soon);
        assert!(!patience.lasts(Duration::ZERO), "one is a coincidence");
        patience.note(soon);
        assert!(patience.lasts(soon) && !patience.lasts(late));
        patience.note(late);
        assert!(!patience.lasts(Duration::ZERO), "it was in vain");
    }
}
