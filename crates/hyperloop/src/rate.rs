//! A token bucket.

use std::time::{Duration, Instant};

/// Lets `per_second` pass on average and at most `burst` at once.
#[derive(Debug)]
pub struct Bucket {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let burst = f64::from(burst);
        Self { per_second: f64::from(per_second), burst, left: burst, at: now }
    }

    /// Takes `n`, or says how long to wait until they are there; `None` of that when they never will be.
    pub fn take(&mut self, n: usize, now: Instant) -> Result<(), Option<Duration>> {
        let n = n as f64;
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + since * self.per_second).min(self.burst);
        self.at = now;
        if n > self.burst {
            return Err(None);
        }
        if n > self.left {
            return Err(Some(Duration::from_secs_f64(
                (n - self.left) / self.per_second.max(f64::MIN_POSITIVE),
            )));
        }
        self.left -= n;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// In any time span no more passes than the burst and what the rate gives.
        #[test]
        fn never_more_than_the_rate(steps in prop::collection::vec((0u64..400, 0usize..30), 1..80)) {
            let start = Instant::now();
            let mut bucket = Bucket::new(50, 20, start);
            let mut now = start;
            let mut passed = 0.0;
            for (ms, n) in steps {
                now += Duration::from_millis(ms);
                if bucket.take(n, now).is_ok() {
                    passed += n as f64;
                }
                let most = 20.0 + 50.0 * now.duration_since(start).as_secs_f64();
                prop_assert!(passed <= most + 1e-6);
            }
        }
    }

    #[test]
    fn says_how_long_to_wait() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, 5, start);
        assert_eq!(bucket.take(6, start), Err(None));
        assert_eq!(bucket.take(5, start), Ok(()));
        let wait = bucket.take(5, start).unwrap_err().unwrap();
        assert_eq!(bucket.take(5, start + wait), Ok(()));
    }
}
