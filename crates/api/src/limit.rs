//! How many sandboxes a team may run at once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use http::StatusCode;
use parking_lot::Mutex;

use crate::{Api, ApiError, list};

/// Sandboxes that are being started, by team: the node does not list them yet.
#[derive(Debug, Clone, Default)]
pub struct Starting(Arc<Mutex<HashMap<String, HashSet<String>>>>);

/// A sandbox that counts for its team until this is dropped.
#[derive(Debug)]
pub struct Place {
    starting: Starting,
    team: String,
    sandbox: String,
}

impl Starting {
    fn enter(&self, team: &str, sandbox: &str) -> Place {
        self.0.lock().entry(team.to_owned()).or_default().insert(sandbox.to_owned());
        Place { starting: self.clone(), team: team.to_owned(), sandbox: sandbox.to_owned() }
    }

    /// How many a team has, of which these run.
    fn count(&self, team: &str, running: HashSet<String>) -> usize {
        let starting = self.0.lock();
        let more = starting.get(team).map_or(0, |s| s.iter().filter(|s| !running.contains(*s)).count());
        running.len() + more
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.starting.0.lock();
        if let Some(of_team) = all.get_mut(&self.team) {
            of_team.remove(&self.sandbox);
            if of_team.is_empty() {
                all.remove(&self.team);
            }
        }
    }
}

impl Api {
    /// Takes a place for a sandbox of a team; hold it until the sandbox runs.
    ///
    /// # Errors
    /// 429, when the team has none left.
    pub(crate) async fn place(&self, team: &str, sandbox: &str) -> Result<Place, ApiError> {
        // First of all, so that of two that come at once not both find the last place free.
        let place = self.starting.enter(team, sandbox);
        let limit = self.store.team_of_id(team).await?.map_or(0, |t| t.max_sandboxes);
        let Ok(limit @ 1..) = usize::try_from(limit) else { return Ok(place) };
        let running = self.running_of(team).await?.iter().map(|s| list::id(s).to_owned()).collect();
        if self.starting.count(team, running) > limit {
            return Err(ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!(
                    "You have reached the maximum number of concurrent sandboxes ({limit}): kill or pause one first"
                ),
            ).for_good());
        }
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_counts_once_and_until_it_is_done() {
        let starting = Starting::default();
        let running = |ids: &[&str]| ids.iter().map(|i| (*i).to_owned()).collect::<HashSet<_>>();
        let a = starting.enter("t", "a");
        let b = starting.enter("t", "b");
        let _other = starting.enter("u", "c");
        assert_eq!(starting.count("t", running(&["x"])), 3);
        assert_eq!(starting.count("t", running(&["x", "a"])), 3, "it runs, and its start is not done");
        drop((a, b));
        assert_eq!(starting.count("t", running(&["x", "a"])), 2);
        assert_eq!(starting.0.lock().len(), 1);
    }
}
