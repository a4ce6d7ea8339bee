/// A token that a sequence has already seen, for the penalties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenToken {
    /// Token id.
    pub id: u32,
    /// Times it was generated; 0 when it occurs in the prompt only.
    pub generated: u32,
}

/// How one row of logits is turned into a token.
///
/// Order of the steps, as in transformers and vLLM: repetition penalty, presence and frequency penalty, temperature,
/// top-k, top-p, min-p, draw. A temperature of 0 is greedy: the largest logit after penalties, lowest id on a tie.
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
    /// Token ids that must not be drawn.
    pub banned: &'a [u32],
}

/// One drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability under the raw logits (before penalties and temperature).
    pub logprob: f32,
}

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
    fn uniform_is_uniform_enough() {
        let draws: Vec<f32> = (0..20_000).map(|i| uniform(42, i)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert_ne!(uniform(1, 0), uniform(2, 0));
    }
}
