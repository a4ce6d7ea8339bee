//! Compiled grammars that are likely to be asked for again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::limits::Limits;
use crate::matcher::Grammar;

/// What a [`Compiler`](crate::Compiler)'s cache has done and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Grammars held.
    pub entries: usize,
    /// Bytes of these, estimated.
    pub bytes: usize,
    /// Sources that were found, ever.
    pub hits: u64,
    /// Sources that had to be compiled, ever.
    pub misses: u64,
}

/// Keeps what was used last, within a number of entries and of bytes.
pub(crate) struct Cache {
    entries: usize,
    bytes: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    grammars: HashMap<[u8; 32], Entry>,
    clock: u64,
    hits: u64,
    misses: u64,
}

struct Entry {
    grammar: Grammar,
    used: u64,
}

impl Cache {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self { entries: limits.cache_entries, bytes: limits.cache_bytes, state: Mutex::default() }
    }

    /// A state is whole after every statement, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, key: &[u8; 32]) -> Option<Grammar> {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        let found = state.grammars.get_mut(key).map(|entry| {
            entry.used = now;
            entry.grammar.clone()
        });
        match found {
            Some(_) => state.hits += 1,
            None => state.misses += 1,
        }
        found
    }

    /// Takes a grammar in; those that were not used for longest make room. One that is larger than the whole cache is not
    /// kept.
    pub(crate) fn insert(&self, key: [u8; 32], grammar: Grammar) {
        let mut state = self.state();
        state.clock += 1;
        let used = state.clock;
        state.grammars.insert(key, Entry { grammar, used });
        // Grammars grow while they are used, so all are weighed anew.
        let mut bytes: usize = state.grammars.values().map(|entry| entry.grammar.bytes()).sum();
        while bytes > self.bytes || state.grammars.len() > self.entries {
            let oldest = state.grammars.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            let Some(entry) = oldest.and_then(|key| state.grammars.remove(&key)) else { break };
            bytes = bytes.saturating_sub(entry.grammar.bytes());
        }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let state = self.state();
        CacheStats {
            entries: state.grammars.len(),
            bytes: state.grammars.values().map(|entry| entry.grammar.bytes()).sum(),
            hits: state.hits,
            misses: state.misses,
        }
    }
}
