//! Prompt lookup: what followed the last tokens of a sequence when they were there before is a guess at what follows now.

use std::hash::{DefaultHasher, Hasher};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::config::ConfigError;

/// Speculative decoding by prompt lookup (Saxena, "Prompt Lookup Decoding", 2023), with the names of vLLM's `--speculative-config`
/// of method `ngram`. A draft follows the latest earlier occurrence of the longest n-gram that the sequence ends with, so it costs
/// no model. It pays where answers repeat their prompt: summaries, edits, code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramConfig {
    /// Most tokens of a draft, 1 to [`NgramConfig::MAX_TOKENS`].
    pub num_speculative_tokens: usize,
    /// The longest n-gram that is looked up. Each size from `prompt_lookup_min` on is a table of up to 21 bytes a token of the sequence.
    pub prompt_lookup_max: usize,
    /// The shortest; a draft after a short one is often wrong.
    pub prompt_lookup_min: usize,
}

impl NgramConfig {
    /// Most tokens of a draft.
    pub const MAX_TOKENS: usize = 16;

    /// Checks that drafts can be found.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |field, message| Err(ConfigError { field, message });
        if !(1..=Self::MAX_TOKENS).contains(&self.num_speculative_tokens) {
            let message = format!("is {}; must be 1 to {}", self.num_speculative_tokens, Self::MAX_TOKENS);
            return fail("speculation.num_speculative_tokens", message);
        }
        if self.prompt_lookup_min == 0 {
            return fail("speculation.prompt_lookup_min", "must be at least 1".into());
        }
        if self.prompt_lookup_max < self.prompt_lookup_min {
            let Self { prompt_lookup_max: max, prompt_lookup_min: min, .. } = self;
            let message = format!("is {max}; must be at least prompt_lookup_min ({min})");
            return fail("speculation.prompt_lookup_max", message);
        }
        Ok(())
    }
}

/// An n-gram by the position behind it.
#[derive(Debug, Clone, Copy)]
struct Ngram {
    /// Kept, so that a table that grows does not read the tokens again.
    hash: u32,
    end: u32,
}

/// Where each n-gram that ends in a range of positions was last. Tokens stay where the caller has them, and are compared, so
/// that equal hashes make no draft. Memory is 9 bytes a slot, up to 21 for each token and size: for sizes 2 to 4 at most 63 bytes a token,
/// beside 57,344 of KV (Qwen2 7B in bf16).
#[derive(Debug)]
pub(crate) struct NgramIndex {
    config: NgramConfig,
    /// Has hashed what clients do not know, so that they cannot send what falls into one slot.
    key: DefaultHasher,
    /// One for each size from `prompt_lookup_min`.
    tables: Vec<HashTable<Ngram>>,
    /// The first end that is not in the tables.
    next: usize,
}

/// The hash that a table goes by: its high and low bits count.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Whether the `size` tokens before `a` and those before `b` are the same.
fn same(a: usize, b: usize, size: usize, token: impl Fn(usize) -> Option<u32>) -> bool {
    (1..=size).all(|back| match (a.checked_sub(back), b.checked_sub(back)) {
        (Some(a), Some(b)) => token(a) == token(b),
        _ => false,
    })
}

impl NgramIndex {
    /// An index of the n-grams that end behind `first` tokens or more.
    pub(crate) fn new(config: NgramConfig, secret: &[u8], first: usize) -> Self {
        let mut key = DefaultHasher::new();
        key.write(secret);
        let sizes = config.prompt_lookup_min..=config.prompt_lookup_max;
        Self { config, key, tables: sizes.map(|_| HashTable::new()).collect(), next: first.max(1) }
    }

    /// Whether all n-grams that end before `limit` are there.
    pub(crate) fn reaches(&self, limit: usize) -> bool {
        self.next >= limit
    }

    /// Room for all n-grams that end before `limit`, so that no table grows on the way.
    pub(crate) fn reserve(&mut self, limit: usize) {
        let more = limit.saturating_sub(self.next);
        self.tables.iter_mut().for_each(|table| table.reserve(more, |ngram| spread(ngram.hash)));
    }

    /// Takes in the n-grams that end before `limit`, at most `most` ends; returns how many. An n-gram counts once a token follows it,
    /// so `limit` is at most the length of the sequence.
    pub(crate) fn extend(
        &mut self,
        limit: usize,
        most: usize,
        token: impl Fn(usize) -> Option<u32>,
    ) -> usize {
        let first = self.next;
        let limit = limit.min(first.saturating_add(most));
        while self.next < limit {
            let end = self.next;
            self.next += 1;
            let Ok(end_u32) = u32::try_from(end) else { continue };
            let hashes = self.hashes(end, &token);
            for ((size, hash), table) in hashes.into_iter().zip(&mut self.tables) {
                let equal = |ngram: &Ngram| ngram.hash == hash && same(ngram.end as usize, end, size, &token);
                match table.entry(spread(hash), equal, |ngram| spread(ngram.hash)) {
                    Entry::Occupied(mut entry) => entry.get_mut().end = end_u32,
                    Entry::Vacant(entry) => drop(entry.insert(Ngram { hash, end: end_u32 })),
                }
            }
        }
        self.next - first
    }

    /// Size and hash of the n-grams that end before `end`, from the shortest.
    fn hashes(&self, end: usize, token: impl Fn(usize) -> Option<u32>) -> Vec<(usize, u32)> {
        let mut hasher = self.key.clone();
        let sizes = 1..=self.config.prompt_lookup_max.min(end);
        let all = sizes.map_while(|size| {
            hasher.write_u32(token(end - size)?);
            Some((size, hasher.finish() as u32))
        });
        all.skip(self.config.prompt_lookup_min - 1).collect()
    }

    fn find(
        &self,
        size: usize,
        hash: u32,
        end: usize,
        token: impl Fn(usize) -> Option<u32>,
    ) -> Option<usize> {
        let table = self.tables.get(size.checked_sub(self.config.prompt_lookup_min)?)?;
        let equal = |ngram: &Ngram| ngram.hash == hash && same(ngram.end as usize, end, size, &token);
        table.find(spread(hash), equal).map(|ngram| ngram.end as usize)
    }
}

/// At most `most` tokens that may follow the `len` tokens of a sequence, none when no n-gram at its end was there before. `indexes` are
/// those of parts of the sequence, of one configuration and secret, the later part first. A draft that reaches the end of the sequence goes on in itself, as
/// the copies of LZ77 do: what repeats goes on repeating.
pub(crate) fn draft(
    indexes: [&NgramIndex; 2],
    len: usize,
    most: usize,
    token: impl Fn(usize) -> Option<u32>,
) -> Vec<u32> {
    let [late, _] = indexes;
    let hashes = late.hashes(len, &token);
    let found = hashes
        .iter()
        .rev()
        .find_map(|&(size, hash)| indexes.iter().find_map(|index| index.find(size, hash, len, &token)));
    let Some(start) = found else { return Vec::new() };
    let mut drafted: Vec<u32> = Vec::with_capacity(most);
    while drafted.len() < most {
        let position = start + drafted.len();
        let next = match position.checked_sub(len) {
            Some(back) => drafted.get(back).copied(),
            None => token(position),
        };
        let Some(next) = next else { break };
        drafted.push(next);
    }
    drafted
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: NgramConfig =
        NgramConfig { num_speculative_tokens: 5, prompt_lookup_max: 3, prompt_lookup_min: 1 };

    /// By a scan of all that was before.
    fn naive(config: NgramConfig, tokens: &[u32]) -> Vec<u32> {
        let NgramConfig { num_speculative_tokens, prompt_lookup_max, prompt_lookup_min } = config;
        for size in (prompt_lookup_min..=prompt_lookup_max).rev().filter(|&size| size < tokens.len()) {
            let last = &tokens[tokens.len() - size..];
            if let Some(start) = (0..tokens.len() - size).rev().find(|&s| tokens[s..s + size] == *last) {
                let follows = &tokens[start + size..];
                return follows.iter().copied().cycle().take(num_speculative_tokens).collect();
            }
        }
        Vec::new()
    }

    fn random(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % below
    }

    /// Tokens come one by one behind prompts of all lengths, of few values, so that much is there again.
    #[test]
    fn drafts_are_those_of_a_scan() {
        let (mut state, mut found) = (1, 0);
        for run in 0..400 {
            let (min, max) = [(1, 3), (2, 2), (2, 4), (1, 1)][run % 4];
            let config = NgramConfig { prompt_lookup_min: min, prompt_lookup_max: max, ..CONFIG };
            let values = 2 + random(&mut state, 20);
            let mut tokens: Vec<u32> = Vec::new();
            let prompt = random(&mut state, 40) as usize;
            let mut indexes = [prompt, 0].map(|first| NgramIndex::new(config, b"secret", first));
            indexes[run % 2].reserve(30);
            for len in 1..90 {
                tokens.push(random(&mut state, values) as u32);
                if len < prompt {
                    continue;
                }
                let token = |position: usize| tokens.get(position).copied();
                while !indexes[1].reaches(prompt) {
                    assert!((1..=7).contains(&indexes[1].extend(prompt, 7, token)));
                }
                indexes[0].extend(len, usize::MAX, token);
                let drafted = draft([&indexes[0], &indexes[1]], len, config.num_speculative_tokens, token);
                assert_eq!(drafted, naive(config, &tokens), "{tokens:?}");
                found += usize::from(!drafted.is_empty());
            }
        }
        assert!(found > 10_000, "{found}");
    }

    #[test]
    fn the_longest_match_counts_and_of_its_length_the_latest() {
        let cases: [(&[u32], &[u32]); 6] = [
            (&[1, 2, 3, 9, 3, 8, 1, 2, 3], &[9, 3, 8, 1, 2]),
            (&[3, 9, 3, 8, 3], &[8, 3, 8, 3, 8]),
            (&[5, 6, 7, 1, 5, 6, 7, 2, 5, 6, 7], &[2, 5, 6, 7, 2]),
            (&[4, 4, 4], &[4, 4, 4, 4, 4]),
            (&[1, 2, 3], &[]),
            (&[1], &[]),
        ];
        for (tokens, expected) in cases {
            let token = |position: usize| tokens.get(position).copied();
            let mut index = NgramIndex::new(CONFIG, b"", 0);
            index.extend(tokens.len(), usize::MAX, token);
            let empty = NgramIndex::new(CONFIG, b"", usize::MAX);
            assert_eq!(draft([&empty, &index], tokens.len(), 5, token), expected, "{tokens:?}");
            assert_eq!(naive(CONFIG, tokens), expected, "{tokens:?}");
        }
    }

    /// A table never holds more than the n-grams that differ.
    #[test]
    fn what_repeats_takes_no_memory() {
        let mut index = NgramIndex::new(CONFIG, b"", 0);
        index.extend(100_000, usize::MAX, |position| Some(position as u32 % 7));
        let sizes: Vec<usize> = index.tables.iter().map(HashTable::len).collect();
        assert_eq!(sizes, [7, 7, 7]);
        assert!(index.tables.iter().map(HashTable::allocation_size).sum::<usize>() < 1000);
    }
}
