//! Who may wait: requests are refused before they reach the step loop, so that a refusal is an answer and not an event.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_scheduler::KeyId;

use crate::serving::{Namespace, Refusal};

/// Bounds of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Requests that wait.
    pub requests: usize,
    /// Prompt tokens that wait.
    pub tokens: usize,
    /// Requests of one API key that wait.
    pub requests_per_key: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { requests: 1024, tokens: usize::MAX, requests_per_key: usize::MAX }
    }
}

/// Bounds of [`Refusal`]'s `retry_after`.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Counts what waits.
pub(super) struct Admission {
    limits: QueueLimits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: usize,
    tokens: usize,
    keys: HashMap<Namespace, Key>,
    /// When a request last left the queue, and the mean time between two that did.
    left: Option<Instant>,
    interval: Duration,
}

#[derive(Default)]
struct Key {
    number: u64,
    requests: usize,
}

/// A request's place in the queue, given back when dropped.
pub(super) struct Place {
    admission: Arc<Admission>,
    namespace: Namespace,
    tokens: usize,
}

impl Admission {
    pub(super) fn new(limits: QueueLimits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a request of `tokens` prompt tokens, and the number of its key.
    ///
    /// # Errors
    /// No room, and when there may be some.
    pub(super) fn admit(
        self: &Arc<Self>,
        namespace: &Namespace,
        tokens: usize,
    ) -> Result<(Place, KeyId), Refusal> {
        let mut state = self.state();
        let limits = self.limits;
        let saturated = |state: &State, reason: String| Refusal::Saturated {
            reason,
            retry_after: state.retry_after(state.requests),
        };
        if state.requests >= limits.requests {
            return Err(saturated(
                &state,
                format!("{} requests are waiting, which is the most", state.requests),
            ));
        }
        // A prompt that is longer than the bound waits alone.
        if state.requests > 0 && state.tokens.saturating_add(tokens) > limits.tokens {
            return Err(saturated(
                &state,
                format!("{} prompt tokens are waiting, of {} at most", state.tokens, limits.tokens),
            ));
        }
        let next = state.keys.len() as u64;
        let waiting = state.keys.get(namespace).map_or(0, |key| key.requests);
        if waiting >= limits.requests_per_key {
            let reason = format!("{waiting} requests of this key are waiting, which is its most");
            return Err(Refusal::Quota { reason, retry_after: state.retry_after(waiting) });
        }
        let key = state.keys.entry(namespace.clone()).or_insert(Key { number: next, requests: 0 });
        key.requests += 1;
        let number = KeyId(key.number);
        state.requests += 1;
        state.tokens += tokens;
        Ok((Place { admission: Arc::clone(self), namespace: namespace.clone(), tokens }, number))
    }
}

impl State {
    /// When `waiting` requests will have left, as they have been leaving.
    fn retry_after(&self, waiting: usize) -> Duration {
        self.interval.saturating_mul(u32::try_from(waiting / 2).unwrap_or(u32::MAX)).clamp(RETRY.0, RETRY.1)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        state.requests = state.requests.saturating_sub(1);
        state.tokens = state.tokens.saturating_sub(self.tokens);
        if let Some(key) = state.keys.get_mut(&self.namespace) {
            key.requests = key.requests.saturating_sub(1);
        }
        let now = Instant::now();
        if let Some(before) = state.left.replace(now) {
            let since = now.saturating_duration_since(before);
            state.interval = (state.interval * 7 + since.min(RETRY.1)) / 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Namespace {
        Namespace(Some(name.into()))
    }

    #[test]
    fn places_are_counted_and_come_back() {
        let limits = QueueLimits { requests: 3, tokens: 100, requests_per_key: 2 };
        let admission = Arc::new(Admission::new(limits));
        let (first, number) = admission.admit(&key("a"), 500).unwrap();
        assert_eq!(number, KeyId(0));
        let refusal = |result: Result<(Place, KeyId), Refusal>| result.map(drop).unwrap_err();
        let full = refusal(admission.admit(&key("b"), 1));
        assert!(
            matches!(&full, Refusal::Saturated { reason, .. } if reason.contains("500 prompt tokens")),
            "{full}"
        );
        drop(first);
        let (_one, number) = admission.admit(&key("b"), 10).unwrap();
        assert_eq!(number, KeyId(1));
        let (_two, _) = admission.admit(&key("b"), 10).unwrap();
        let quota = refusal(admission.admit(&key("b"), 10));
        assert!(matches!(&quota, Refusal::Quota { retry_after, .. } if *retry_after >= RETRY.0), "{quota}");
        let (_three, number) = admission.admit(&key("a"), 10).unwrap();
        assert_eq!(number, KeyId(0));
        let full = refusal(admission.admit(&key("c"), 1));
        assert!(
            matches!(&full, Refusal::Saturated { reason, .. } if reason.contains("3 requests")),
            "{full}"
        );
    }
}
