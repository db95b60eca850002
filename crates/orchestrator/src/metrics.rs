//! Figures of sandboxes over time: processor, memory and disk as their envd says, and how many run.
//!
//! What a guest says is its own word: it is bounded here, belongs to that sandbox alone, and gets the node's
//! time. A guest that does not answer has no figures and costs nobody else anything.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use futures::StreamExt;
use nidus_envd_protocol::{ENVD_PORT, EnvdClient, GuestMetrics};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::Node;
use crate::node::{Entry, State};

/// Looks that are kept of each sandbox and each team: an hour, at one each 5 s.
const KEPT: usize = 720;
/// Sandboxes whose figures are kept, ended ones among them, and teams.
const MOST: usize = 1024;
/// Guests that are asked at once, and the time that each has.
const AT_ONCE: usize = 16;
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// One look at a sandbox. Sizes in bytes, the processors' use in percent of all of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Sample {
    pub timestamp: DateTime<Utc>,
    pub timestamp_unix: i64,
    pub cpu_used_pct: f64,
    pub cpu_count: i32,
    pub mem_total: i64,
    pub mem_used: i64,
    pub mem_cache: i64,
    pub disk_total: i64,
    pub disk_used: i64,
}

impl Sample {
    fn new(now: DateTime<Utc>, said: &GuestMetrics) -> Self {
        let size = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            timestamp: now,
            timestamp_unix: now.timestamp(),
            cpu_used_pct: said.cpu_used_pct.clamp(0.0, 100.0),
            cpu_count: i32::try_from(said.cpu_count).unwrap_or(i32::MAX),
            mem_total: size(said.mem_total),
            mem_used: size(said.mem_used),
            mem_cache: size(said.mem_cache),
            disk_total: size(said.disk_total),
            disk_used: size(said.disk_used),
        }
    }
}

/// One look at a team.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TeamSample {
    pub timestamp: DateTime<Utc>,
    pub timestamp_unix: i64,
    pub concurrent_sandboxes: usize,
    /// Sandboxes a second that were started since the look before.
    pub sandbox_start_rate: f64,
}

trait At {
    fn at(&self) -> DateTime<Utc>;
}

impl At for Sample {
    fn at(&self) -> DateTime<Utc> {
        self.timestamp
    }
}

impl At for TeamSample {
    fn at(&self) -> DateTime<Utc> {
        self.timestamp
    }
}

/// The newest looks at each of many.
#[derive(Debug)]
struct Series<T>(HashMap<String, VecDeque<T>>);

impl<T> Default for Series<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: At + Clone> Series<T> {
    fn add(&mut self, id: &str, sample: T, kept: usize, most: usize) {
        if !self.0.contains_key(id) && self.0.len() >= most {
            // Whoever was not looked at for the longest time.
            let oldest =
                self.0.iter().min_by_key(|(_, all)| all.back().map(At::at)).map(|(id, _)| id.clone());
            if let Some(oldest) = oldest {
                self.0.remove(&oldest);
            }
        }
        let all = self.0.entry(id.to_owned()).or_default();
        while all.len() >= kept {
            all.pop_front();
        }
        all.push_back(sample);
    }

    fn between(&self, id: &str, start: Option<i64>, end: Option<i64>) -> Vec<T> {
        let all = self.0.get(id).into_iter().flatten();
        let inside = |t: &&T| {
            let at = t.at().timestamp();
            start.is_none_or(|s| at >= s) && end.is_none_or(|e| at <= e)
        };
        all.filter(inside).cloned().collect()
    }
}

/// What is kept of all of them.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    sandboxes: Mutex<Series<Sample>>,
    teams: Mutex<Series<TeamSample>>,
}

/// A sandbox's key: another team's sandbox of the same id is another one.
fn key(team: &str, id: &str) -> String {
    format!("{team}/{id}")
}

impl Metrics {
    /// Looks at a team's sandbox, oldest first, from and to these seconds since 1970.
    pub fn of(&self, team: &str, id: &str, start: Option<i64>, end: Option<i64>) -> Vec<Sample> {
        self.sandboxes.lock().between(&key(team, id), start, end)
    }

    /// The newest look at it.
    pub fn newest(&self, team: &str, id: &str) -> Option<Sample> {
        self.sandboxes.lock().0.get(&key(team, id))?.back().cloned()
    }

    /// Looks at a team.
    pub fn of_team(&self, team: &str, start: Option<i64>, end: Option<i64>) -> Vec<TeamSample> {
        self.teams.lock().between(team, start, end)
    }
}

/// Asks the guest, unless it is not to be asked; only what it said while it was surely this one counts: the
/// address is another's some time after.
async fn look(node: &Node, entry: &Entry) {
    let running = || *entry.state.lock() == State::Running && !entry.kill.is_cancelled();
    let c = &entry.config;
    let Some(ip) = entry.host_ip.get().filter(|_| running()) else { return };
    let envd = EnvdClient::new(SocketAddr::from((*ip, ENVD_PORT)), c.envd_access_token.clone());
    let answer = tokio::select! {
        () = entry.kill.cancelled() => return,
        answer = envd.metrics(ANSWER_LIMIT) => answer,
    };
    match answer {
        Ok(said) if running() => {
            let sample = Sample::new(Utc::now().trunc_subsecs(3), &said);
            node.metrics.sandboxes.lock().add(&key(&c.team_id, &c.sandbox_id), sample, KEPT, MOST);
        }
        Ok(_) => {}
        Err(e) => tracing::debug!(sandbox = %c.sandbox_id, "no figures: {e}"),
    }
}

fn look_at_teams(node: &Node, entries: &[Arc<Entry>], since: DateTime<Utc>, now: DateTime<Utc>) {
    let mut known = node.metrics.teams.lock();
    // Who had one before has none now.
    let before: Vec<String> = known.0.keys().cloned().collect();
    let mut teams: HashMap<&str, (usize, usize)> = before.iter().map(|t| (t.as_str(), (0, 0))).collect();
    for entry in entries {
        let (running, started) = teams.entry(entry.config.team_id.as_str()).or_default();
        *running += usize::from(entry.is_running());
        *started += usize::from(entry.start > since);
    }
    let seconds = (now - since).as_seconds_f64().max(0.001);
    for (team, (running, started)) in teams {
        let sample = TeamSample {
            timestamp: now.trunc_subsecs(3),
            timestamp_unix: now.timestamp(),
            concurrent_sandboxes: running,
            sandbox_start_rate: started as f64 / seconds,
        };
        known.add(team, sample, KEPT, MOST);
    }
}

/// Looks again and again until `stop`.
pub(crate) async fn run(node: Arc<Node>, stop: CancellationToken) {
    if node.config.metrics_every.is_zero() {
        return stop.cancelled().await;
    }
    let mut ticks = tokio::time::interval(node.config.metrics_every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut since = Utc::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let entries: Vec<Arc<Entry>> = node.sandboxes.lock().values().cloned().collect();
        let now = Utc::now();
        look_at_teams(&node, &entries, since, now);
        since = now;
        let all = futures::stream::iter(&entries).for_each_concurrent(AT_ONCE, |entry| look(&node, entry));
        tokio::select! {
            () = stop.cancelled() => return,
            () = all => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(second: i64) -> Sample {
        let said = GuestMetrics { mem_used: second.unsigned_abs(), ..Default::default() };
        Sample::new(DateTime::from_timestamp(second, 0).unwrap(), &said)
    }

    proptest! {
        #[test]
        fn bounded_and_the_newest_and_each_its_own(
            seen in prop::collection::vec(0usize..5, 0..40), kept in 1usize..4, start in 0i64..40, end in 0i64..40
        ) {
            let mut series = Series::default();
            for (second, who) in seen.iter().enumerate() {
                series.add(&who.to_string(), sample(second as i64), kept, 5);
            }
            for who in 0..5 {
                let own: Vec<i64> = seen.iter().enumerate().filter(|(_, w)| **w == who).map(|(s, _)| s as i64).collect();
                let newest = &own[own.len().saturating_sub(kept)..];
                let expected: Vec<i64> = newest.iter().copied().filter(|s| *s >= start && *s <= end).collect();
                let got: Vec<i64> =
                    series.between(&who.to_string(), Some(start), Some(end)).iter().map(|s| s.timestamp_unix).collect();
                prop_assert_eq!(got, expected);
            }
        }
    }

    #[test]
    fn who_was_not_looked_at_for_the_longest_time_goes_first() {
        let mut series = Series::default();
        for (second, who) in [(1, "a"), (2, "b"), (3, "a"), (4, "c")] {
            series.add(who, sample(second), 9, 2);
        }
        assert_eq!((series.between("a", None, None).len(), series.between("b", None, None).len()), (2, 0));
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let said = GuestMetrics {
            cpu_count: u64::MAX,
            cpu_used_pct: 1e300,
            mem_total: u64::MAX,
            ..Default::default()
        };
        let s = Sample::new(DateTime::UNIX_EPOCH, &said);
        assert_eq!((s.cpu_count, s.cpu_used_pct, s.mem_total), (i32::MAX, 100.0, i64::MAX));
    }
}
