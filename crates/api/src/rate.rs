//! How often a team may ask.

use std::collections::HashMap;
use std::time::Instant;

use parking_lot::Mutex;

/// A bucket per team that fills at a rate and holds two seconds of it.
#[derive(Debug)]
pub struct Rates {
    /// Requests a second; 0 is without a limit.
    rate: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// More teams than this are looked through for those whose bucket is full again.
const MANY: usize = 1024;

impl Rates {
    /// So many requests a second of each team; 0 is without a limit.
    pub fn new(per_second: u32) -> Self {
        Self { rate: f64::from(per_second), buckets: Mutex::default() }
    }

    /// Counts a request of a team; false when it is one too many.
    pub fn take(&self, team: &str) -> bool {
        self.take_at(team, Instant::now())
    }

    fn take_at(&self, team: &str, now: Instant) -> bool {
        if self.rate == 0.0 {
            return true;
        }
        let full = 2.0 * self.rate;
        let filled =
            |b: &Bucket| (b.left + now.saturating_duration_since(b.at).as_secs_f64() * self.rate).min(full);
        let mut buckets = self.buckets.lock();
        if buckets.len() > MANY {
            buckets.retain(|_, b| filled(b) < full);
        }
        let bucket = buckets.entry(team.to_owned()).or_insert(Bucket { left: full, at: now });
        bucket.left = filled(bucket);
        bucket.at = now;
        let takes = bucket.left >= 1.0;
        if takes {
            bucket.left -= 1.0;
        }
        takes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_and_is_its_teams() {
        let rates = Rates::new(5);
        let start = Instant::now();
        assert!((0..10).all(|_| rates.take_at("a", start)));
        assert!(!rates.take_at("a", start));
        assert!(rates.take_at("b", start));
        let later = start + Duration::from_millis(400);
        assert!(rates.take_at("a", later) && rates.take_at("a", later) && !rates.take_at("a", later));
        let unlimited = Rates::new(0);
        assert!((0..1000).all(|_| unlimited.take_at("a", start)));
    }

    #[test]
    fn teams_that_have_gone_cost_nothing() {
        let rates = Rates::new(1);
        let start = Instant::now();
        (0..=MANY).for_each(|n| assert!(rates.take_at(&n.to_string(), start)));
        rates.take_at("last", start + Duration::from_secs(9));
        assert_eq!(rates.buckets.lock().len(), 1);
    }
}
