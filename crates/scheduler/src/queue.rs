//! Who is next: priority with ageing, then the key that was served least, then arrival.

use std::collections::{BTreeMap, VecDeque};

use crate::config::QueueLimits;
use crate::request::{KeyId, QueueBound, RequestId};

/// A waiting request's weight in the limits.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Load {
    pub(crate) requests: usize,
    pub(crate) tokens: usize,
    pub(crate) bytes: usize,
}

impl Load {
    pub(crate) fn of(tokens: usize, bytes: usize) -> Self {
        Self { requests: 1, tokens, bytes }
    }

    fn add(&mut self, other: Load) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }

    fn subtract(&mut self, other: Load) {
        self.requests -= other.requests.min(self.requests);
        self.tokens -= other.tokens.min(self.tokens);
        self.bytes -= other.bytes.min(self.bytes);
    }

    /// The bound that one more request breaks, and its limit.
    fn exceeds(&self, more: Load, limits: QueueLimits) -> Option<(QueueBound, usize)> {
        [
            (QueueBound::Requests, self.requests, more.requests, limits.requests),
            (QueueBound::Tokens, self.tokens, more.tokens, limits.tokens),
            (QueueBound::Bytes, self.bytes, more.bytes, limits.bytes),
        ]
        .into_iter()
        .find(|&(_, held, more, limit)| held.saturating_add(more) > limit)
        .map(|(bound, _, _, limit)| (bound, limit))
    }
}

/// The account of a key.
#[derive(Debug, Clone, Default)]
struct Account {
    /// Weighted tokens served, lifted when the key comes back from being idle.
    counter: u64,
    /// Requests that have not ended.
    live: usize,
    /// Requests that were started and have not ended.
    started: usize,
    waiting: Load,
}

/// The waiting requests, and the accounts of all keys: virtual token counters (Sheng et al., "Fairness in Serving Large Language
/// Models", OSDI 2024, algorithm 2).
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: BTreeMap<(KeyId, u8), VecDeque<RequestId>>,
    total: Load,
    accounts: BTreeMap<KeyId, Account>,
    /// The least counter of a key with requests when there last was one: where a key that comes back begins.
    floor: u64,
}

impl Queue {
    /// Waiting requests, their prompt tokens and bytes.
    pub(crate) fn total(&self) -> Load {
        self.total
    }

    /// The bound of the key's share, or of the whole queue, that one more request breaks. The flag says which: true, the key's.
    pub(crate) fn refuses(
        &self,
        key: KeyId,
        load: Load,
        key_limits: QueueLimits,
        limits: QueueLimits,
    ) -> Option<(bool, QueueBound, usize)> {
        let own = self.accounts.get(&key).map(|a| a.waiting).unwrap_or_default();
        let of_key = own.exceeds(load, key_limits).map(|(bound, limit)| (true, bound, limit));
        of_key.or_else(|| self.total.exceeds(load, limits).map(|(bound, limit)| (false, bound, limit)))
    }

    pub(crate) fn push(&mut self, key: KeyId, priority: u8, id: RequestId, load: Load) {
        let floor = self.update_floor();
        let account = self.accounts.entry(key).or_default();
        if account.live == 0 {
            account.counter = account.counter.max(floor);
        }
        account.live += 1;
        account.waiting.add(load);
        self.total.add(load);
        self.waiting.entry((key, priority)).or_default().push_back(id);
    }

    /// Takes a request out of the queue: it is started, or has ended.
    pub(crate) fn remove(&mut self, key: KeyId, priority: u8, id: RequestId, load: Load) {
        if let Some(queue) = self.waiting.get_mut(&(key, priority)) {
            if queue.front() == Some(&id) {
                queue.pop_front();
            } else {
                queue.retain(|&other| other != id);
            }
            if queue.is_empty() {
                self.waiting.remove(&(key, priority));
            }
        }
        self.total.subtract(load);
        if let Some(account) = self.accounts.get_mut(&key) {
            account.waiting.subtract(load);
        }
    }

    /// A request of `key` is started, at the cost of its prompt.
    pub(crate) fn start(&mut self, key: KeyId, cost: u64) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.started += 1;
        }
        self.charge(key, cost);
    }

    /// A request of `key` has ended.
    pub(crate) fn end(&mut self, key: KeyId, was_started: bool) {
        self.update_floor();
        let Some(account) = self.accounts.get_mut(&key) else { return };
        account.live = account.live.saturating_sub(1);
        account.started -= usize::from(was_started && account.started > 0);
        let floor = self.update_floor();
        // An idle key at or below the floor would begin there anyway: its account says nothing.
        self.accounts.retain(|_, a| a.live > 0 || a.counter > floor);
    }

    fn update_floor(&mut self) -> u64 {
        if let Some(least) = self.accounts.values().filter(|a| a.live > 0).map(|a| a.counter).min() {
            self.floor = self.floor.max(least);
        }
        self.floor
    }

    pub(crate) fn charge(&mut self, key: KeyId, cost: u64) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.counter = account.counter.saturating_add(cost);
        }
    }

    pub(crate) fn counter(&self, key: KeyId) -> u64 {
        self.accounts.get(&key).map_or(0, |a| a.counter)
    }

    pub(crate) fn started(&self, key: KeyId) -> usize {
        self.accounts.get(&key).map_or(0, |a| a.started)
    }

    /// The requests that wait longest among those of the same key and priority.
    pub(crate) fn heads(&self) -> impl Iterator<Item = (KeyId, RequestId)> + '_ {
        self.waiting.iter().filter_map(|(&(key, _), queue)| Some((key, *queue.front()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(keys: &[(u64, u64)]) -> Queue {
        let mut queue = Queue::default();
        for (index, &(key, _)) in keys.iter().enumerate() {
            queue.push(KeyId(key), 0, RequestId(index as u64), Load::of(1, 1));
        }
        keys.iter().for_each(|&(key, cost)| queue.charge(KeyId(key), cost));
        queue
    }

    #[test]
    fn a_key_that_comes_back_begins_where_the_least_served_stands() {
        let mut queue = queue(&[(1, 100), (2, 40)]);
        queue.push(KeyId(3), 0, RequestId(9), Load::of(1, 1));
        assert_eq!(queue.counter(KeyId(3)), 40, "idle time is not saved up");
        queue.push(KeyId(1), 0, RequestId(10), Load::of(1, 1));
        assert_eq!(queue.counter(KeyId(1)), 100, "a key that is there keeps its counter");
    }

    #[test]
    fn leaving_does_not_wipe_the_slate() {
        let mut queue = queue(&[(1, 100), (2, 40)]);
        queue.remove(KeyId(1), 0, RequestId(0), Load::of(1, 1));
        queue.end(KeyId(1), false);
        queue.push(KeyId(1), 0, RequestId(9), Load::of(1, 1));
        assert_eq!(queue.counter(KeyId(1)), 100);
        // But an account that says nothing is dropped.
        queue.remove(KeyId(2), 0, RequestId(1), Load::of(1, 1));
        queue.end(KeyId(2), false);
        assert!(!queue.accounts.contains_key(&KeyId(2)));
        assert_eq!(queue.total().requests, 1);
    }

    #[test]
    fn the_broken_bound_is_named() {
        let queue = queue(&[(1, 0), (2, 0)]);
        let limits = |requests, tokens, bytes| QueueLimits { requests, tokens, bytes };
        let none = QueueLimits::NONE;
        let refuses = |key_limits, all| queue.refuses(KeyId(1), Load::of(5, 7), key_limits, all);
        assert_eq!(refuses(none, none), None);
        assert_eq!(refuses(limits(2, 6, 8), limits(3, 7, 9)), None);
        assert_eq!(refuses(limits(1, 9, 9), none), Some((true, QueueBound::Requests, 1)));
        assert_eq!(refuses(none, limits(9, 6, 99)), Some((false, QueueBound::Tokens, 6)));
        assert_eq!(refuses(none, limits(9, 9, 8)), Some((false, QueueBound::Bytes, 8)));
    }
}
