//! Weights from a seed instead of a file: for measurements and dry runs of models whose files are not there.
//!
//! Every element is a function of (seed, tensor name, element index) alone, so a slice is bit for bit the slice of the
//! whole tensor, in any order and on any rank, and only the slice is generated. 64 hash bits (the splitmix64 finaliser,
//! Steele et al., OOPSLA 2014) give four elements; each takes 12 of its 16 bits as an index into the quantiles of the
//! normal distribution, already scaled and rounded to the dtype.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use longhaul_backend::{DType, HostTensor};

use crate::slice::Region;
use crate::{Result, Slice, TensorSource, TensorSpec, WeightsError};

/// Quantiles of the normal distribution kept.
const QUANTILES: usize = 4096;
/// Elements from one hash.
const LANES: usize = 4;
/// Standard deviation of embeddings and biases: the `initializer_range` of the family.
const INITIALIZER_RANGE: f32 = 0.02;

/// Generated weights of the shapes a model expects.
///
/// Norm weights are 1; linear weights are normal with standard deviation `1 / sqrt(in_features)`, so that a product
/// neither grows nor shrinks its input; embeddings and biases are normal with standard deviation 0.02. A forward pass
/// through any depth stays finite.
#[derive(Debug)]
pub struct Dummy {
    tensors: HashMap<String, Vec<usize>>,
    dtype: DType,
    seed: u64,
    generated: AtomicU64,
}

impl Dummy {
    /// A source for the tensors `expected`, all of `dtype`, that depends on `seed`.
    pub fn new(expected: Vec<TensorSpec>, dtype: DType, seed: u64) -> Self {
        let tensors = expected.into_iter().map(|spec| (spec.name, spec.shape)).collect();
        Self { tensors, dtype, seed, generated: AtomicU64::new(0) }
    }
}

impl TensorSource for Dummy {
    fn tensor(&self, name: &str, slice: Slice) -> Result<HostTensor<'_>> {
        let shape = self.tensors.get(name).ok_or_else(|| WeightsError::UnknownTensor {
            file: "dummy weights".to_owned(),
            tensor: name.to_owned(),
        })?;
        let region = slice.resolve(name, shape)?;
        let out_of_memory =
            |bytes: usize| WeightsError::OutOfMemory { tensor: name.to_owned(), bytes: bytes as u64 };
        let elements = region.piece.checked_mul(region.pieces).ok_or_else(|| out_of_memory(usize::MAX))?;
        let bytes = elements.checked_mul(self.dtype.size()).ok_or_else(|| out_of_memory(usize::MAX))?;
        let mut data: Vec<u8> = Vec::new();
        data.try_reserve_exact(bytes).map_err(|_| out_of_memory(bytes))?;

        let values = Values::of(name, shape);
        let key = mix(name_hash(name) ^ mix(self.seed));
        match self.dtype {
            DType::BF16 => generate(&mut data, &region, key, values, |v| bf16::from_f32(v).to_le_bytes()),
            DType::F16 => generate(&mut data, &region, key, values, |v| f16::from_f32(v).to_le_bytes()),
            DType::F32 => generate(&mut data, &region, key, values, f32::to_le_bytes),
            DType::F8E4M3 => {
                return Err(WeightsError::DType {
                    file: "dummy weights".to_owned(),
                    tensor: name.to_owned(),
                    found: self.dtype.to_string(),
                });
            }
        }
        self.generated.fetch_add(bytes as u64, Ordering::Relaxed);
        HostTensor::new(self.dtype, region.shape, data.into())
            .map_err(|source| WeightsError::Tensor { tensor: name.to_owned(), source })
    }

    fn inventory(&self) -> Vec<String> {
        let line = |(name, shape): (&String, &Vec<usize>)| {
            format!("{name} {} {shape:?} of seed {}", self.dtype, self.seed)
        };
        let mut lines: Vec<String> = self.tensors.iter().map(line).collect();
        lines.sort_unstable();
        lines
    }

    fn total_bytes(&self) -> u64 {
        let bytes = |shape: &Vec<usize>| {
            shape.iter().fold(self.dtype.size() as u64, |n, &d| n.saturating_mul(d as u64))
        };
        self.tensors.values().map(bytes).fold(0, u64::saturating_add)
    }

    fn bytes_read(&self) -> u64 {
        self.generated.load(Ordering::Relaxed)
    }
}

/// How the elements of a tensor are distributed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Values {
    /// All the same.
    Constant(f32),
    /// Normal around zero with this standard deviation.
    Normal(f32),
}

impl Values {
    /// By the published naming: `*norm.weight` scales, `*.bias`, embeddings, and `[out, in]` linear weights.
    fn of(name: &str, shape: &[usize]) -> Self {
        match *shape {
            _ if name.ends_with("norm.weight") => Values::Constant(1.0),
            [_, in_features] if !name.ends_with("embed_tokens.weight") => {
                Values::Normal(1.0 / (in_features.max(1) as f32).sqrt())
            }
            _ => Values::Normal(INITIALIZER_RANGE),
        }
    }
}

/// Appends the elements of `region`, each encoded in `N` bytes.
fn generate<const N: usize>(
    out: &mut Vec<u8>,
    region: &Region,
    key: u64,
    values: Values,
    encode: impl Fn(f32) -> [u8; N],
) {
    match values {
        Values::Constant(value) => {
            let bytes = encode(value);
            (0..region.piece * region.pieces).for_each(|_| out.extend_from_slice(&bytes));
        }
        Values::Normal(deviation) => {
            let mut table = [[0; N]; QUANTILES];
            for (slot, quantile) in table.iter_mut().zip(quantiles()) {
                *slot = encode(quantile * deviation);
            }
            for piece in 0..region.pieces {
                fill(out, &table, key, region.start + piece * region.stride, region.piece);
            }
        }
    }
}

/// Appends elements `start..start + len` of the tensor with `key`.
fn fill<const N: usize>(out: &mut Vec<u8>, table: &[[u8; N]; QUANTILES], key: u64, start: usize, len: usize) {
    // 16 bits a lane, of which the mask keeps 12: the index cannot leave the table.
    let block = |index: usize| -> [[u8; N]; LANES] {
        let hash = mix(key.wrapping_add((index as u64).wrapping_mul(GOLDEN_GAMMA)));
        std::array::from_fn(|lane| table[(hash >> (16 * lane)) as usize & (QUANTILES - 1)])
    };
    let end = start + len;
    let (first_block, last_block) = (start / LANES, end / LANES);
    let part = |index: usize, from: usize, to: usize| {
        block(index)
            .into_iter()
            .enumerate()
            .filter(move |(lane, _)| (from..to).contains(lane))
            .map(|(_, bytes)| bytes)
    };
    if first_block == last_block {
        part(first_block, start % LANES, end % LANES).for_each(|bytes| out.extend_from_slice(&bytes));
        return;
    }
    part(first_block, start % LANES, LANES).for_each(|bytes| out.extend_from_slice(&bytes));
    for index in first_block + 1..last_block {
        out.extend_from_slice(block(index).as_flattened());
    }
    part(last_block, 0, end % LANES).for_each(|bytes| out.extend_from_slice(&bytes));
}

/// Increment of splitmix64: 2^64 divided by the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64: every input bit changes every output bit with probability about one half.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits: stable across releases and platforms, unlike the standard library's hasher.
fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Quantiles of the standard normal distribution at the midpoints of [`QUANTILES`] equal probabilities.
fn quantiles() -> &'static [f32; QUANTILES] {
    static TABLE: OnceLock<[f32; QUANTILES]> = OnceLock::new();
    TABLE.get_or_init(|| std::array::from_fn(|i| normal_quantile((i as f64 + 0.5) / QUANTILES as f64) as f32))
}

/// Inverse of the standard normal distribution function, by P. J. Acklam's rational approximation (relative error below
/// 1.2e-9).
#[allow(clippy::excessive_precision)]
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.383577518672690e+02,
        -3.066479806614716e+01,
        2.506628277459239e+00,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838e+00,
        -2.549732539343734e+00,
        4.374664141464968e+00,
        2.938163982698783e+00,
    ];
    const D: [f64; 5] =
        [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00, 1.0];
    /// Where the tails begin.
    const TAIL: f64 = 0.02425;
    let horner = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -normal_quantile(1.0 - p);
    }
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        return horner(&C, q) / horner(&D, q);
    }
    let q = p - 0.5;
    q * horner(&A, q * q) / horner(&B, q * q)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize]) -> TensorSpec {
        TensorSpec::new(name, shape)
    }

    #[test]
    fn quantiles_invert_the_normal_distribution() {
        // The distribution function by Simpson's rule from 0, independent of the approximation.
        let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let cdf = |x: f64| {
            let steps = 2000;
            let h = x / f64::from(steps);
            let inner: f64 =
                (1..steps).map(|i| density(h * f64::from(i)) * if i % 2 == 0 { 2.0 } else { 4.0 }).sum();
            0.5 + (density(0.0) + inner + density(x)) * h / 3.0
        };
        for i in (0..QUANTILES).step_by(61).chain([QUANTILES - 1]) {
            let p = (i as f64 + 0.5) / QUANTILES as f64;
            let back = cdf(f64::from(quantiles()[i]));
            assert!((back - p).abs() < 1e-7, "quantile {p}: {back}");
        }
    }

    #[test]
    fn every_slice_equals_the_slice_of_the_whole() {
        let (rows, cols) = (9, 13);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let dummy = Dummy::new(vec![spec("w", &[rows, cols])], dtype, 7);
            let size = dtype.size();
            let whole = dummy.tensor("w", Slice::All).unwrap().bytes().to_vec();
            let element = |r: usize, c: usize| &whole[(r * cols + c) * size..(r * cols + c + 1) * size];
            for start in 0..=cols {
                for end in start..=cols {
                    let expected: Vec<u8> = (0..rows)
                        .flat_map(|r| (start..end).flat_map(move |c| element(r, c)))
                        .copied()
                        .collect();
                    assert_eq!(dummy.tensor("w", Slice::Cols(start..end)).unwrap().bytes(), expected);
                }
            }
            for start in 0..=rows {
                for end in start..=rows {
                    let expected = &whole[start * cols * size..end * cols * size];
                    assert_eq!(dummy.tensor("w", Slice::Rows(start..end)).unwrap().bytes(), expected);
                }
            }
        }
    }

    #[test]
    fn seed_and_name_decide_and_nothing_else_does() {
        let specs = || vec![spec("a.weight", &[64, 64]), spec("b.weight", &[64, 64])];
        let get = |seed, name| {
            Dummy::new(specs(), DType::BF16, seed).tensor(name, Slice::All).unwrap().bytes().to_vec()
        };
        assert_eq!(get(1, "a.weight"), get(1, "a.weight"));
        assert_ne!(get(1, "a.weight"), get(2, "a.weight"));
        assert_ne!(get(1, "a.weight"), get(1, "b.weight"));
        let mut reversed = specs();
        reversed.reverse();
        let other = Dummy::new(reversed, DType::BF16, 1);
        other.tensor("b.weight", Slice::All).unwrap();
        assert_eq!(other.tensor("a.weight", Slice::All).unwrap().bytes(), get(1, "a.weight"));
    }

    #[test]
    fn scales_follow_the_kind_of_tensor() {
        let specs = vec![
            spec("model.layers.0.mlp.down_proj.weight", &[256, 1024]),
            spec("model.embed_tokens.weight", &[1024, 256]),
            spec("model.layers.0.self_attn.q_proj.bias", &[65536]),
            spec("model.layers.0.input_layernorm.weight", &[256]),
            spec("model.norm.weight", &[256]),
        ];
        let dummy = Dummy::new(specs, DType::F32, 3);
        for (name, deviation) in [
            ("model.layers.0.mlp.down_proj.weight", 1.0 / 32.0),
            ("model.embed_tokens.weight", 0.02),
            ("model.layers.0.self_attn.q_proj.bias", 0.02),
        ] {
            let values = dummy.tensor(name, Slice::All).unwrap().to_f32();
            let n = values.len() as f64;
            let moment = |k: i32| values.iter().map(|&v| (f64::from(v) / deviation).powi(k)).sum::<f64>() / n;
            // Four standard errors of each moment of a normal sample.
            let bound = |variance: f64| 4.0 * (variance / n).sqrt() + 2e-3;
            assert!(moment(1).abs() < bound(1.0), "{name}: mean {}", moment(1));
            assert!((moment(2) - 1.0).abs() < bound(2.0), "{name}: variance {}", moment(2));
            assert!((moment(4) - 3.0).abs() < bound(96.0) + 0.02, "{name}: kurtosis {}", moment(4));
            let lag: f64 = values.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>()
                / deviation.powi(2)
                / n;
            assert!(lag.abs() < bound(1.0), "{name}: neighbours correlate by {lag}");
        }
        for name in ["model.layers.0.input_layernorm.weight", "model.norm.weight"] {
            assert!(dummy.tensor(name, Slice::All).unwrap().to_f32().iter().all(|&v| v == 1.0));
        }
    }

    #[test]
    fn progress_and_errors() {
        let dummy = Dummy::new(vec![spec("w", &[4, 6]), spec("huge", &[usize::MAX / 4, 2])], DType::F32, 0);
        dummy.tensor("w", Slice::Rows(0..2)).unwrap();
        assert_eq!(dummy.bytes_read(), 48);
        assert!(dummy.tensor("nothing", Slice::All).unwrap_err().to_string().contains("nothing"));
        assert!(dummy.tensor("huge", Slice::All).unwrap_err().to_string().contains("huge"));
    }
}
