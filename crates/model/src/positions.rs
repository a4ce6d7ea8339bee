//! Which positions a model rotates by at a given context length: plain RoPE, YaRN, Dual Chunk Attention.

use std::fmt;
use std::str::FromStr;

use longhaul_backend::{Chunking, RopeTables};
use serde::{Deserialize, Serialize};

use crate::{ModelError, ModelSpec, Result, rope};

/// How a model reads beyond the window it was trained on (`--long-context`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LongContext {
    /// Plain RoPE, whatever the checkpoint says.
    None,
    /// The checkpoint's `rope_scaling`, static.
    Yarn,
    /// Dual Chunk Attention.
    Dca,
}

impl fmt::Display for LongContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LongContext::None => "none",
            LongContext::Yarn => "yarn",
            LongContext::Dca => "dca",
        })
    }
}

impl FromStr for LongContext {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "none" => Ok(LongContext::None),
            "yarn" => Ok(LongContext::Yarn),
            "dca" => Ok(LongContext::Dca),
            _ => Err(format!("\"{s}\" is not a long-context mode: dca, yarn or none")),
        }
    }
}

/// The rotation of a model for contexts up to `max_model_len`.
///
/// The factor on a row's logits is a function of the row's own position, so cached prefixes stay exact and chunked
/// prefill equals prefill in one go; within the trained window it is 1 (`docs/architecture.md`, "Positions").
#[derive(Debug, Clone)]
pub struct PositionProfile {
    /// The mode in force.
    pub mode: LongContext,
    /// Largest context, tokens.
    pub max_model_len: usize,
    /// DCA's integers.
    pub chunking: Option<Chunking>,
    inv_freq: Vec<f64>,
    head_dim: usize,
    /// YaRN's `a`; 1 without YaRN.
    attention_factor: f64,
    /// `O` of the logarithmic length scale.
    scale_from: Option<usize>,
}

/// KV blocks hold at most this many tokens.
const MAX_BLOCK: usize = 64;

impl PositionProfile {
    /// Resolves what the user asked for (`None` = not said) against what the checkpoint says.
    ///
    /// Without a choice, the checkpoint's own `dual_chunk_attention_config` or `rope_scaling` holds; a checkpoint with
    /// neither gets Dual Chunk Attention as soon as the context exceeds its trained window.
    ///
    /// # Errors
    /// [`ModelError::Context`] when mode, length and checkpoint do not go together.
    pub fn new(
        spec: &ModelSpec,
        mode: Option<LongContext>,
        max_model_len: Option<usize>,
    ) -> Result<PositionProfile> {
        let trained = spec.trained_window();
        let max_model_len = max_model_len.unwrap_or_else(|| default_context(spec, mode));
        if max_model_len == 0 || max_model_len > 1 << 27 {
            return Err(ModelError::Context(format!(
                "--max-model-len {max_model_len}: must be between 1 and {}",
                1 << 27
            )));
        }
        if let Some(window) = spec.sliding_window
            && max_model_len > window
        {
            return Err(ModelError::Context(format!(
                "--max-model-len {max_model_len}: the checkpoint's sliding_window of {window} tokens would cut \
                 attention; use at most {window}"
            )));
        }
        let mode = mode.unwrap_or(if spec.dual_chunk.is_some() {
            LongContext::Dca
        } else if spec.yarn.is_some() {
            LongContext::Yarn
        } else if max_model_len > trained {
            LongContext::Dca
        } else {
            LongContext::None
        });
        if mode == LongContext::Yarn && spec.yarn.is_none() {
            return Err(ModelError::Context(
                "--long-context yarn: the checkpoint's config.json has no rope_scaling of type yarn; add one \
                 ({\"type\": \"yarn\", \"factor\": …, \"original_max_position_embeddings\": …}) or use dca"
                    .into(),
            ));
        }
        let yarn = spec.yarn.filter(|_| mode != LongContext::None);
        let (chunking, scale_from) = match mode {
            LongContext::Dca => {
                let (chunk, local, original) = match spec.dual_chunk {
                    Some(d) => (d.chunk_size, d.local_size, d.original_max_position_embeddings),
                    None => {
                        let local = default_local_size(trained);
                        (trained, local, Some(trained))
                    }
                };
                let chunking = Chunking { chunk_size: chunk as u32, local_size: local as u32 };
                (Some(chunking), original)
            }
            _ => (None, None),
        };
        let inv_freq = match &yarn {
            Some(yarn) => rope::yarn_inv_freq(spec.rope_theta, spec.head_dim, yarn),
            None => rope::inv_freq(spec.rope_theta, spec.head_dim),
        };
        Ok(PositionProfile {
            mode,
            max_model_len,
            chunking,
            inv_freq,
            head_dim: spec.head_dim,
            attention_factor: yarn.map_or(1.0, |y| y.attention_factor),
            scale_from,
        })
    }

    /// fp32 factor on `q·k` of the query at `position`: `head_dim^-0.5 · t²` with `t` the larger of YaRN's constant and
    /// the length scale `max(1, 0.1·ln((position + 1) / O) + 1)`.
    pub fn logit_scale(&self, position: usize) -> f32 {
        let length_scale = match self.scale_from {
            Some(original) => (0.1 * ((position + 1) as f64 / original as f64).ln() + 1.0).max(1.0),
            None => 1.0,
        };
        let temperature = self.attention_factor.max(length_scale);
        ((self.head_dim as f64).powf(-0.5) * temperature * temperature) as f32
    }

    /// The tables a device needs for this profile.
    pub fn tables(&self) -> RopeTables {
        rope::tables(&self.inv_freq, self.table_rows(), self.chunking)
    }

    /// Rows of [`PositionProfile::tables`].
    pub fn table_rows(&self) -> usize {
        match self.chunking {
            Some(c) if self.max_model_len > c.len() as usize => c.chunk_size as usize + 1,
            _ => self.max_model_len,
        }
    }

    /// KV blocks of one sequence of the whole context.
    pub fn blocks(&self) -> usize {
        self.max_model_len.div_ceil(self.block_size())
    }

    /// Tokens of a KV block: the largest power of two up to 64 that divides the chunk length, so that no block
    /// straddles a chunk.
    pub fn block_size(&self) -> usize {
        match self.chunking {
            Some(c) => 1 << (c.len().trailing_zeros() as usize).min(MAX_BLOCK.trailing_zeros() as usize),
            None => MAX_BLOCK,
        }
    }
}

/// Context served when the user does not say.
fn default_context(spec: &ModelSpec, mode: Option<LongContext>) -> usize {
    match (mode, spec.yarn) {
        (None | Some(LongContext::Yarn), Some(yarn)) if spec.dual_chunk.is_none() => {
            // The model cards' snippet leaves max_position_embeddings at the trained window.
            let extended = (yarn.factor * yarn.original_max_position_embeddings as f64) as usize;
            extended.max(spec.max_position_embeddings)
        }
        _ => spec.max_position_embeddings,
    }
}

/// `trained / 32`, moved so that the chunk length is a multiple of the KV block where the window allows it.
fn default_local_size(trained: usize) -> usize {
    let local = trained / 32;
    let len = (trained - local) / MAX_BLOCK * MAX_BLOCK;
    if len == 0 { local } else { trained - len }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DualChunkConfig, YarnConfig, family};

    fn spec() -> ModelSpec {
        family("qwen2-7b").unwrap().spec
    }

    fn yarn() -> YarnConfig {
        YarnConfig {
            factor: 4.0,
            original_max_position_embeddings: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.138629436111989,
        }
    }

    #[test]
    fn dca_starts_where_the_trained_window_ends() {
        let short = PositionProfile::new(&spec(), None, Some(32768)).unwrap();
        assert_eq!((short.mode, short.chunking), (LongContext::None, None));
        let long = PositionProfile::new(&spec(), None, Some(131_072)).unwrap();
        assert_eq!(long.mode, LongContext::Dca);
        assert_eq!(long.chunking, Some(Chunking { chunk_size: 32768, local_size: 1024 }));
        assert_eq!(long.block_size(), 64);
        assert_eq!(long.tables().rows, 32769);
        let base = short.logit_scale(0);
        assert_eq!(base, (128f64.powf(-0.5)) as f32);
        assert_eq!(long.logit_scale(32767), base, "untouched within the window");
        // m(131072) = 1.138629436 for O = 32768 (published).
        let m2 = f64::from(long.logit_scale(131_071)) / 128f64.powf(-0.5);
        assert!((m2 - 1.296476993).abs() < 1e-6, "{m2}");
    }

    #[test]
    fn the_checkpoints_own_config_is_honoured() {
        let dual_chunk = DualChunkConfig {
            chunk_size: 262_144,
            local_size: 8192,
            original_max_position_embeddings: Some(262_144),
        };
        let one_million =
            ModelSpec { dual_chunk: Some(dual_chunk), max_position_embeddings: 1_010_000, ..spec() };
        let profile = PositionProfile::new(&one_million, None, None).unwrap();
        assert_eq!((profile.mode, profile.max_model_len), (LongContext::Dca, 1_010_000));
        assert_eq!(profile.chunking.unwrap().len(), 253_952);
        // A context within one chunk needs no more rows than tokens.
        assert_eq!(PositionProfile::new(&one_million, None, Some(4096)).unwrap().tables().rows, 4096);
        let plain = PositionProfile::new(&one_million, Some(LongContext::None), None).unwrap();
        assert_eq!(plain.chunking, None);
    }

    #[test]
    fn yarn_is_static_and_its_temperature_is_not_applied_twice() {
        let with_yarn = ModelSpec { yarn: Some(yarn()), ..spec() };
        let profile = PositionProfile::new(&with_yarn, None, None).unwrap();
        assert_eq!((profile.mode, profile.max_model_len), (LongContext::Yarn, 131_072));
        let a2 = profile.logit_scale(0) / 128f32.powf(-0.5);
        assert!((a2 - 1.296_477).abs() < 1e-6, "{a2}");
        // With DCA on top: YaRN's frequencies, and the larger temperature once.
        let both = PositionProfile::new(&with_yarn, Some(LongContext::Dca), Some(131_072)).unwrap();
        assert_eq!(both.inv_freq, profile.inv_freq);
        assert_eq!(both.logit_scale(0), profile.logit_scale(0));
        assert!((both.logit_scale(131_071) / profile.logit_scale(0) - 1.0).abs() < 1e-6);
        assert!(both.logit_scale(262_143) > profile.logit_scale(0));
        // `none` switches both off.
        let none = PositionProfile::new(&with_yarn, Some(LongContext::None), Some(131_072)).unwrap();
        assert_eq!(none.inv_freq, rope::inv_freq(1e6, 128));
    }

    #[test]
    fn impossible_requests_name_the_flag() {
        let error =
            |spec: &ModelSpec, mode, len| PositionProfile::new(spec, mode, len).unwrap_err().to_string();
        assert!(error(&spec(), Some(LongContext::Yarn), None).contains("rope_scaling"));
        assert!(error(&spec(), None, Some(0)).contains("--max-model-len 0"));
        let windowed = ModelSpec { sliding_window: Some(40_000), ..spec() };
        assert!(error(&windowed, None, Some(40_001)).contains("sliding_window of 40000"));
        assert!(PositionProfile::new(&windowed, None, Some(40_000)).is_ok());
    }

    #[test]
    fn blocks_never_straddle_a_chunk() {
        for (chunk_size, local_size, block) in [(768, 128, 64), (80, 16, 64), (24, 8, 16), (10, 3, 1)] {
            let dual_chunk =
                DualChunkConfig { chunk_size, local_size, original_max_position_embeddings: None };
            let spec = ModelSpec { dual_chunk: Some(dual_chunk), ..spec() };
            let profile = PositionProfile::new(&spec, None, None).unwrap();
            assert_eq!(profile.block_size(), block);
            assert_eq!((chunk_size - local_size) % block, 0);
        }
        for trained in [32, 100, 512, 4096, 32768, 262_144] {
            let local = default_local_size(trained);
            assert!(local < trained);
            assert!(trained < 64 || (trained - local).is_multiple_of(64));
        }
    }
}
