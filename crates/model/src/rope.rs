//! Rotation frequencies and tables, in f64: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071 as transformers computes it).

use std::f64::consts::PI;

use longhaul_backend::{Chunking, RopeTables};

use crate::spec::YarnConfig;

/// `theta^(-2i/dim)` for the `dim / 2` pairs.
pub fn inv_freq(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// First and last pair of YaRN's ramp: pairs before are left alone, pairs after are divided by the factor.
pub fn yarn_ramp(theta: f64, dim: usize, yarn: &YarnConfig) -> (f64, f64) {
    let original = yarn.original_max_position_embeddings as f64;
    let pair = |rotations: f64| dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    // `dim - 1`, not `dim / 2 - 1`: as in every published implementation.
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    (low, high)
}

/// YaRN's frequencies: interpolated by `factor` where a pair turns less than once over the trained window.
pub fn yarn_inv_freq(theta: f64, dim: usize, yarn: &YarnConfig) -> Vec<f64> {
    let (low, high) = yarn_ramp(theta, dim, yarn);
    inv_freq(theta, dim)
        .into_iter()
        .enumerate()
        .map(|(i, f)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f * (1.0 - ramp) + f / yarn.factor * ramp
        })
        .collect()
}

/// YaRN's factor on cos and sin when the config does not give `attention_factor`.
pub fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let get = |scale: f64, x: f64| if scale <= 1.0 { 1.0 } else { 0.1 * x * scale.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => get(factor, m) / get(factor, all),
        _ => get(factor, 1.0),
    }
}

/// cos and sin of positions `0..rows`: angles and functions in f64, stored as f32.
pub fn tables(inv_freq: &[f64], rows: usize, chunking: Option<Chunking>) -> RopeTables {
    let angles = || (0..rows).flat_map(|p| inv_freq.iter().map(move |f| p as f64 * f));
    RopeTables {
        half_dim: inv_freq.len(),
        rows,
        cos: angles().map(|a| a.cos() as f32).collect(),
        sin: angles().map(|a| a.sin() as f32).collect(),
        chunking,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `theta` 1e6, head_dim 128, factor 4, O 32768: the values printed by the float64 reference.
    #[allow(clippy::excessive_precision, reason = "digits as printed")]
    const PRINTED: [(usize, f64, f64); 10] = [
        (0, 1.000000000000000e+00, 1.000000000000000e+00),
        (22, 8.659643233600654e-03, 8.659643233600654e-03),
        (23, 6.978305848598663e-03, 6.978305848598663e-03),
        (24, 5.623413251903491e-03, 5.375321490790102e-03),
        (30, 1.539926526059492e-03, 1.064360981247002e-03),
        (31, 1.240937760751720e-03, 8.029597275452302e-04),
        (39, 2.206734069084590e-04, 6.490394320837029e-05),
        (40, 1.778279410038923e-04, 4.445698525097307e-05),
        (63, 1.240937760751720e-06, 3.102344401879299e-07),
        (1, 0.805842187761482, 0.805842187761482),
    ];

    fn yarn(factor: f64) -> YarnConfig {
        YarnConfig {
            factor,
            original_max_position_embeddings: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: yarn_attention_factor(factor, None, None),
        }
    }

    #[test]
    fn yarn_frequencies_match_the_printed_table() {
        let base = inv_freq(1e6, 128);
        let scaled = yarn_inv_freq(1e6, 128, &yarn(4.0));
        for (pair, expected_base, expected_yarn) in PRINTED {
            assert!((base[pair] - expected_base).abs() < 1e-12, "base {pair}: {}", base[pair]);
            assert!((scaled[pair] - expected_yarn).abs() < 1e-12, "yarn {pair}: {}", scaled[pair]);
        }
        assert_eq!(yarn_ramp(1e6, 128, &yarn(4.0)), (23.0, 40.0));
        assert_eq!(yarn_ramp(1e6, 64, &yarn(4.0)), (11.0, 20.0));
        let untruncated = yarn_ramp(1e6, 128, &YarnConfig { truncate: false, ..yarn(4.0) });
        assert!((untruncated.0 - 23.595947608338).abs() < 1e-11, "{untruncated:?}");
        assert!((untruncated.1 - 39.650880710417).abs() < 1e-11, "{untruncated:?}");
    }

    #[test]
    fn attention_factor_matches_the_published_values() {
        assert!((yarn_attention_factor(4.0, None, None) - 1.138629436111989).abs() < 1e-12);
        assert!((yarn_attention_factor(2.0, None, None) - 1.069314718055995).abs() < 1e-12);
        assert_eq!(yarn_attention_factor(1.0, None, None), 1.0);
        assert_eq!(yarn_attention_factor(40.0, Some(1.0), Some(1.0)), 1.0);
    }

    #[test]
    fn tables_are_the_rounded_f64_values() {
        let t = tables(&inv_freq(1e6, 64), 40_000, None);
        let (cos, sin) = t.row(39_999).unwrap();
        assert_eq!(cos[0], 39_999f64.cos() as f32);
        assert_eq!(sin[0], 39_999f64.sin() as f32);
        assert!(t.row(40_000).is_none());
    }
}
