//! What one key may ask for: requests and tokens a minute, requests at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::serving::Refusal;

/// What the owner of a key is called and may ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyTerms {
    /// What logs call the key.
    pub name: Option<String>,
    /// Requests a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers a minute.
    pub tokens_per_minute: Option<u32>,
    /// Requests at a time.
    pub concurrent: Option<u32>,
    /// Added to the priority of its requests; lower is served earlier.
    pub priority: i32,
}

/// A key's terms, and how far they are used up.
#[derive(Debug)]
pub(crate) struct Quota {
    pub(crate) terms: KeyTerms,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

/// Fills evenly, up to what a minute brings; may owe what was not known before it was spent.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_minute: u32, now: Instant) -> Self {
        Self { per_minute: f64::from(per_minute), level: f64::from(per_minute), at: now }
    }

    fn fill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + seconds * self.per_minute / 60.0).min(self.per_minute);
        self.at = now;
    }

    /// How long until there is one.
    fn wait(&self) -> Option<Duration> {
        let missing = 1.0 - self.level;
        (missing > 0.0).then(|| Duration::from_secs_f64(missing * 60.0 / self.per_minute.max(1.0)))
    }
}

/// A request that was admitted; its place is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Quota>);

impl Quota {
    pub(crate) fn new(terms: KeyTerms, now: Instant) -> Self {
        let bucket = |limit: Option<u32>| limit.map(|limit| Bucket::new(limit, now));
        let state = State {
            requests: bucket(terms.requests_per_minute),
            tokens: bucket(terms.tokens_per_minute),
            running: 0,
        };
        Self { terms, state: Mutex::new(state) }
    }

    /// A state is whole after every statement, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a request.
    ///
    /// # Errors
    /// A quota is used up; when there is room again.
    pub(crate) fn admit(self: &Arc<Self>, now: Instant) -> Result<Lease, Refusal> {
        let mut state = self.state();
        let state = &mut *state;
        if let Some(most) = self.terms.concurrent
            && state.running >= most
        {
            let reason = format!("{most} requests of this key are running, which is its most");
            return Err(Refusal::Quota { reason, retry_after: Duration::from_secs(1) });
        }
        for (bucket, what) in [(&mut state.tokens, "tokens"), (&mut state.requests, "requests")] {
            let Some(bucket) = bucket else { continue };
            bucket.fill(now);
            if let Some(wait) = bucket.wait() {
                let reason = format!("the key's {} {what} a minute are used up", bucket.per_minute);
                // Whole seconds, so that whoever waits as long as it was told is let in.
                let retry_after = Duration::from_secs(wait.as_secs_f64().ceil() as u64);
                return Err(Refusal::Quota { reason, retry_after });
            }
        }
        if let Some(bucket) = &mut state.requests {
            bucket.level -= 1.0;
        }
        state.running += 1;
        Ok(Lease(Arc::clone(self)))
    }
}

impl Lease {
    /// The request cost `tokens`.
    pub(crate) fn spend(&self, tokens: usize, now: Instant) {
        if let Some(bucket) = &mut self.0.state().tokens {
            bucket.fill(now);
            bucket.level -= tokens as f64;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.running = state.running.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(result: Result<Lease, Refusal>) -> (String, u64) {
        match result.map(drop).unwrap_err() {
            Refusal::Quota { reason, retry_after } => (reason, retry_after.as_secs()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn requests_and_tokens_come_back_evenly() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let terms =
            KeyTerms { requests_per_minute: Some(3), tokens_per_minute: Some(600), ..KeyTerms::default() };
        let quota = Arc::new(Quota::new(terms, start));
        for _ in 0..3 {
            quota.admit(start).unwrap();
        }
        let (reason, retry) = refused(quota.admit(start));
        assert_eq!((reason.as_str(), retry), ("the key's 3 requests a minute are used up", 20));
        refused(quota.admit(at(19)));
        let lease = quota.admit(at(20)).unwrap();
        // More than there is: the key owes 400 of 600 a minute.
        lease.spend(1000, at(20));
        let (reason, retry) = refused(quota.admit(at(60)));
        assert_eq!((reason.as_str(), retry), ("the key's 600 tokens a minute are used up", 1));
        quota.admit(at(61)).unwrap();
        // A refusal costs nothing, and a long pause brings no more than a minute's worth.
        for _ in 0..3 {
            quota.admit(at(100_000)).unwrap();
        }
        refused(quota.admit(at(100_000)));
    }

    #[test]
    fn places_are_given_back() {
        let now = Instant::now();
        let quota = Arc::new(Quota::new(KeyTerms { concurrent: Some(2), ..KeyTerms::default() }, now));
        let first = quota.admit(now).unwrap();
        let _second = quota.admit(now).unwrap();
        let (reason, retry) = refused(quota.admit(now));
        assert!(reason.contains("2 requests of this key") && retry == 1, "{reason}");
        drop(first);
        quota.admit(now).unwrap();
    }
}
