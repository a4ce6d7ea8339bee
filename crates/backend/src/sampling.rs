use std::collections::HashSet;

use crate::{Error, Result};

/// A token that a sequence has already seen, for the penalties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenToken {
    /// Token id.
    pub id: u32,
    /// Times it was generated; 0 when it occurs in the prompt only.
    pub generated: u32,
}

/// How one row of logits is turned into a token. The default is greedy without any rule.
///
/// Order of the steps: repetition penalty, presence and frequency penalty, logit bias, banned ids, allowed ids, temperature,
/// top-k, top-p, min-p, draw. Penalties, temperature, top-k and top-p come in the order of transformers; a bias is added
/// behind the penalties, so that it is what was asked for whatever the sequence has seen. Scores saturate at the largest
/// finite f32. A temperature of 0 is greedy: the largest score after all rules, lowest id on a tie. Ids beyond the vocabulary
/// are ignored.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingRow<'a> {
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the k largest; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of largest probabilities that reaches this sum; 1 = all.
    pub top_p: f32,
    /// Drop tokens below this fraction of the largest probability; 0 = none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of seen tokens; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted from generated tokens.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the generated tokens.
    pub frequency_penalty: f32,
    /// Seed of the request.
    pub seed: u64,
    /// Index of the generated token: the draw depends on `(seed, position)` only.
    pub position: u64,
    /// Distinct tokens of prompt and output.
    pub seen: &'a [SeenToken],
    /// Added to the logits of distinct ids; finite.
    pub bias: &'a [(u32, f32)],
    /// Token ids that must not be drawn.
    pub banned: &'a [u32],
    /// The ids that may be drawn (a grammar's): bit `id % 32` of word `id / 32`; `None` = all.
    pub allowed: Option<&'a [u32]>,
}

impl Default for SamplingRow<'_> {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            position: 0,
            seen: &[],
            bias: &[],
            banned: &[],
            allowed: None,
        }
    }
}

impl SamplingRow<'_> {
    /// Whether a device may take the row for `vocab` logits; `index` names it in messages.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a bias that is not finite or names an id twice, and for too short a mask.
    pub fn check(&self, vocab: usize, index: usize) -> Result<()> {
        let error = |detail: String| Err(Error::Sampling { row: index, detail });
        let mut ids = HashSet::with_capacity(self.bias.len());
        for (id, bias) in self.bias {
            if !bias.is_finite() {
                return error(format!("the logit bias of token {id} is {bias}; it must be finite"));
            }
            if !ids.insert(id) {
                return error(format!("the logit bias names token {id} twice"));
            }
        }
        match self.allowed {
            Some(words) if words.len() < vocab.div_ceil(32) => {
                error(format!("a mask of {} words for {vocab} tokens; one bit a token", words.len()))
            }
            _ => Ok(()),
        }
    }

    /// What is subtracted from the logit of `seen` after the repetition penalty.
    pub fn penalty(&self, seen: &SeenToken) -> f32 {
        if seen.generated == 0 {
            return 0.0;
        }
        self.presence_penalty + self.frequency_penalty * seen.generated as f32
    }

    /// Whether the mask lets `id` through.
    pub fn allows(&self, id: u32) -> bool {
        let word = |words: &[u32]| words.get(id as usize / 32).copied().unwrap_or(0);
        self.allowed.is_none_or(|words| word(words) >> (id % 32) & 1 == 1)
    }
}

/// A [`SamplingRow`] with lists of its own: for ranks that draw on other threads or machines.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedSamplingRow {
    /// Its lists are empty.
    parameters: SamplingRow<'static>,
    seen: Vec<SeenToken>,
    bias: Vec<(u32, f32)>,
    banned: Vec<u32>,
    allowed: Option<Vec<u32>>,
}

impl From<&SamplingRow<'_>> for OwnedSamplingRow {
    fn from(row: &SamplingRow<'_>) -> Self {
        let parameters = SamplingRow { seen: &[], bias: &[], banned: &[], allowed: None, ..*row };
        Self {
            parameters,
            seen: row.seen.to_vec(),
            bias: row.bias.to_vec(),
            banned: row.banned.to_vec(),
            allowed: row.allowed.map(<[u32]>::to_vec),
        }
    }
}

impl OwnedSamplingRow {
    /// The row, borrowed.
    pub fn as_row(&self) -> SamplingRow<'_> {
        SamplingRow {
            seen: &self.seen,
            bias: &self.bias,
            banned: &self.banned,
            allowed: self.allowed.as_deref(),
            ..self.parameters
        }
    }
}

/// One drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability under the raw logits (before penalties and temperature).
    pub logprob: f32,
}

/// Why a row drew nothing. The other rows of its batch are not concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// A logit was NaN or infinite: the request must fail instead of returning noise.
    #[error("logits are not finite")]
    NotFinite,
    /// The rules of the row leave no token: all are banned or masked.
    #[error("no token is allowed")]
    NothingAllowed,
}

/// What became of a row.
pub type Draw = std::result::Result<Sampled, RowError>;

/// A uniform number in `[0, 1)` from Philox4x32-10 keyed by `seed`, counter `position`
/// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): every device draws the same one.
pub fn uniform(seed: u64, position: u64) -> f32 {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut counter = [position as u32, (position >> 32) as u32, 0, 0];
    for _ in 0..10 {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    (counter[0] >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First word of Random123's known-answer vector for Philox4x32-10 with zero counter and zero key: 6627e8d5.
    #[test]
    fn philox_matches_the_known_answer() {
        assert_eq!(uniform(0, 0), (0x6627_e8d5u32 >> 8) as f32 / (1 << 24) as f32);
    }

    #[test]
    fn what_no_device_takes_is_an_error() {
        let bad = |row: SamplingRow<'_>, expected: &str| {
            let message = row.check(70, 3).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("row 3"), "{message}");
        };
        bad(SamplingRow { bias: &[(1, f32::NAN)], ..SamplingRow::default() }, "finite");
        bad(SamplingRow { bias: &[(1, 0.5), (2, 0.5), (1, 0.5)], ..SamplingRow::default() }, "token 1 twice");
        bad(SamplingRow { allowed: Some(&[!0, !0]), ..SamplingRow::default() }, "2 words for 70");
        SamplingRow { allowed: Some(&[0; 3]), bias: &[(900, 1.0)], ..SamplingRow::default() }
            .check(70, 0)
            .unwrap();
    }

    #[test]
    fn a_mask_has_one_bit_a_token() {
        let words = [1 << 5, 1 << 31];
        let row = SamplingRow { allowed: Some(&words), ..SamplingRow::default() };
        let allowed: Vec<u32> = (0..100).filter(|&id| row.allows(id)).collect();
        assert_eq!(allowed, [5, 63]);
        assert!(SamplingRow::default().allows(u32::MAX));
    }

    #[test]
    fn an_owned_row_is_the_row() {
        let row = SamplingRow {
            temperature: 0.7,
            top_k: 5,
            seed: 3,
            position: 9,
            seen: &[SeenToken { id: 4, generated: 2 }],
            bias: &[(1, 0.5)],
            banned: &[8],
            allowed: Some(&[7]),
            ..SamplingRow::default()
        };
        assert_eq!(OwnedSamplingRow::from(&row).as_row(), row);
        assert_eq!(OwnedSamplingRow::from(&SamplingRow::default()).as_row(), SamplingRow::default());
    }

    #[test]
    fn uniform_is_uniform_enough() {
        let draws: Vec<f32> = (0..20_000).map(|i| uniform(42, i)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert_ne!(uniform(1, 0), uniform(2, 0));
    }
}
