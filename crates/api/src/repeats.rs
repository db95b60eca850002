//! Creations that may be asked for more than once: `Idempotency-Key`. A client that did not see the answer asks
//! again with the same key, and gets the sandbox that its first request has made.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::ApiError;

/// How long an answer is remembered.
const KEPT: Duration = Duration::from_secs(3600);
/// How many are, of all teams together; then the oldest go.
const MOST: usize = 10_000;
const MAX_KEY: usize = 255;

/// A team, and a key of its.
type Whose = (String, String);

/// What was asked for with which key, and what came of it.
#[derive(Debug, Default)]
pub struct Repeats(Mutex<HashMap<Whose, Arc<Repeat>>>);

#[derive(Debug)]
struct Repeat {
    /// SHA-256 of what was asked for.
    asked: Vec<u8>,
    at: Instant,
    /// The answer, if it was a good one. Whoever comes meanwhile waits here.
    answer: tokio::sync::Mutex<Option<Value>>,
}

/// The key that came with a request.
pub fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    match key.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MAX_KEY && key.bytes().all(plain) => {
            Ok(Some(key.to_owned()))
        }
        _ => Err(ApiError::bad(format!(
            "Idempotency-Key has 1 to {MAX_KEY} lower-case letters, digits and hyphens"
        ))),
    }
}

impl Repeats {
    /// Does it, or answers what came of it before.
    ///
    /// # Errors
    /// 422 when the key was used for something else; and what `make` fails with, which is not remembered.
    pub async fn once(
        &self,
        team: &str,
        key: String,
        asked: &Value,
        make: impl Future<Output = Result<Value, ApiError>>,
    ) -> Result<Value, ApiError> {
        let asked = Sha256::digest(asked.to_string().as_bytes()).to_vec();
        let repeat = self.entry((team.to_owned(), key), &asked, Instant::now());
        if repeat.asked != asked {
            return Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "The Idempotency-Key was used for another request: take a new one",
            ));
        }
        let mut answer = repeat.answer.lock().await;
        if let Some(answer) = &*answer {
            return Ok(answer.clone());
        }
        Ok(answer.insert(make.await?).clone())
    }

    fn entry(&self, whose: Whose, asked: &[u8], now: Instant) -> Arc<Repeat> {
        let mut all = self.0.lock();
        if all.len() >= MOST {
            all.retain(|_, r| now.saturating_duration_since(r.at) < KEPT);
        }
        if all.len() >= MOST
            && let Some(oldest) = all.iter().min_by_key(|(_, r)| r.at).map(|(whose, _)| whose.clone())
        {
            all.remove(&oldest);
        }
        let new =
            || Arc::new(Repeat { asked: asked.to_vec(), at: now, answer: tokio::sync::Mutex::default() });
        let known = all.entry(whose).or_insert_with(new);
        if now.saturating_duration_since(known.at) >= KEPT {
            *known = new();
        }
        known.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn one_key_makes_one() {
        let repeats = Repeats::default();
        let count = AtomicU32::new(0);
        let make = || async {
            tokio::task::yield_now().await;
            Ok(json!(count.fetch_add(1, Ordering::Relaxed)))
        };
        let once = |team, key: &str, asked: Value| {
            let (repeats, key, made) = (&repeats, key.to_owned(), make());
            async move { repeats.once(team, key, &asked, made).await }
        };
        let (a, b) = tokio::join!(once("t", "k", json!({"a": 1})), once("t", "k", json!({"a": 1})));
        assert_eq!((a.unwrap(), b.unwrap()), (json!(0), json!(0)));
        assert_eq!(once("t", "k", json!({"a": 1})).await.unwrap(), json!(0));
        assert_eq!(once("t", "other", json!({"a": 1})).await.unwrap(), json!(1));
        assert_eq!(once("u", "k", json!({"a": 1})).await.unwrap(), json!(2));
        assert_eq!(once("t", "k", json!({"a": 2})).await.unwrap_err().status, 422);
        // What failed may be tried again.
        let failing = async { Err(ApiError::bad("no")) };
        assert!(repeats.once("t", "f".into(), &json!(1), failing).await.is_err());
        assert_eq!(once("t", "f", json!(1)).await.unwrap(), json!(3));
    }

    #[test]
    fn old_ones_go() {
        let repeats = Repeats::default();
        let start = Instant::now();
        let whose = |n: usize| ("t".to_owned(), n.to_string());
        for n in 0..MOST + 5 {
            repeats.entry(whose(n), b"", start + Duration::from_millis(n as u64));
        }
        assert_eq!(repeats.0.lock().len(), MOST);
        assert!(!repeats.0.lock().contains_key(&whose(0)));
        let again = repeats.entry(whose(MOST), b"else", start + KEPT + Duration::from_secs(60));
        assert_eq!(again.asked, b"else");
    }

    #[test]
    fn keys_are_checked() {
        let of = |v: &str| {
            let mut h = HeaderMap::new();
            h.insert("idempotency-key", v.parse().unwrap());
            key(&h)
        };
        assert_eq!(of("a-1").unwrap().as_deref(), Some("a-1"));
        assert_eq!(key(&HeaderMap::new()).unwrap(), None);
        for bad in ["", "A", "a b", &"x".repeat(256)] {
            assert_eq!(of(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
