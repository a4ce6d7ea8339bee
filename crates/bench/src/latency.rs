use std::fmt;

use longhaul_backend::DType;
use longhaul_engine::{Engine, EngineError, Generate, Request};
use serde::Serialize;

use crate::copy_bandwidth;

/// What to measure.
#[derive(Debug, Clone)]
pub struct LatencyConfig {
    /// Tokens of the prompt.
    pub input_len: usize,
    /// Tokens to generate.
    pub output_len: usize,
    /// Measured runs, after one warm-up.
    pub runs: usize,
    /// Tokens of a prefill step; `None` = the engine's default.
    pub chunk: Option<usize>,
    /// Threads of the bandwidth measurement; 0 = all cores.
    pub threads: usize,
}

/// Median and range over the runs.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { at(middle) } else { (at(middle.wrapping_sub(1)) + at(middle)) / 2.0 };
        Self { median, min: at(0), max: at(values.len().wrapping_sub(1)) }
    }
}

/// One request at a time.
#[derive(Debug, Clone, Serialize)]
pub struct LatencyReport {
    /// The model.
    pub model: String,
    /// The device in words.
    pub device: String,
    /// Tokens of the prompt.
    pub input_len: usize,
    /// Tokens generated.
    pub output_len: usize,
    /// Measured runs.
    pub runs: usize,
    /// Prompt tokens per second until the first token is drawn.
    pub prefill_tok_s: Spread,
    /// Tokens per second after the first.
    pub decode_tok_s: Spread,
    /// Floating-point operations of the prefill per second, median.
    pub prefill_gflop_s: f64,
    /// Bytes that decoding a token must read: active weights once, the cache so far.
    pub decode_bytes_per_token: u64,
    /// Bytes per second that a plain copy of the host's memory moves (read plus written); absent where the model is not in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_bytes_per_second: Option<f64>,
    /// Bytes per second of the median decode over those of the copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_fraction_of_copy: Option<f64>,
}

/// Measures prefill and decode of one request, greedy, on a fixed pseudo-random prompt.
///
/// # Errors
/// The engine's, such as a prompt that does not fit.
pub fn latency(
    engine: &mut Engine,
    config: &LatencyConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<LatencyReport, EngineError> {
    let vocab = engine.spec().vocab_size as u64;
    let prompt: Vec<u32> = (0..config.input_len as u64)
        .map(|i| (i.wrapping_mul(6_364_136_223_846_793_005) >> 33).wrapping_rem(vocab) as u32)
        .collect();
    let request =
        Request { ignore_eos: true, chunk: config.chunk, ..Request::greedy(prompt, config.output_len) };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for run in 0..=config.runs.max(1) {
        let timings = engine.generate(&request, &mut ())?.timings;
        if run > 0 {
            prefill.push(timings.prefill_tokens_per_second());
            decode.push(timings.decode_tokens_per_second());
            progress(run, config.runs.max(1));
        }
    }
    let spec = engine.spec();
    let (prefill, decode) = (Spread::of(prefill), Spread::of(decode));
    let flops: u64 = (0..config.input_len)
        .map(|position| spec.flops_per_token(position + 1, position + 1 == config.input_len))
        .sum();
    let middle = config.input_len + config.output_len / 2;
    let decode_bytes = spec.decode_bytes(middle, spec.dtype.unwrap_or(DType::BF16), DType::F32);
    let copy = engine.is_on_host().then(|| copy_bandwidth(config.threads, 5));
    Ok(LatencyReport {
        model: engine.name().into(),
        device: engine.device().into(),
        input_len: config.input_len,
        output_len: config.output_len,
        runs: config.runs.max(1),
        prefill_gflop_s: flops as f64 * prefill.median / config.input_len as f64 / 1e9,
        decode_bytes_per_token: decode_bytes,
        copy_bytes_per_second: copy,
        decode_fraction_of_copy: copy.map(|copy| decode_bytes as f64 * decode.median / copy),
        prefill_tok_s: prefill,
        decode_tok_s: decode,
    })
}

impl fmt::Display for LatencyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spread = |s: &Spread| format!("{:.1} ({:.1}..{:.1})", s.median, s.min, s.max);
        writeln!(f, "{} on {}; median (range) of {} runs", self.model, self.device, self.runs)?;
        writeln!(
            f,
            "prefill {:>6} tokens  {:>26} tok/s  {:.0} GFLOP/s",
            self.input_len,
            spread(&self.prefill_tok_s),
            self.prefill_gflop_s
        )?;
        write!(
            f,
            "decode  {:>6} tokens  {:>26} tok/s  {:.1} GB/s",
            self.output_len,
            spread(&self.decode_tok_s),
            self.decode_bytes_per_token as f64 * self.decode_tok_s.median / 1e9,
        )?;
        match (self.decode_fraction_of_copy, self.copy_bytes_per_second) {
            (Some(fraction), Some(copy)) => {
                write!(f, ", {:.0} % of the {:.1} GB/s that a copy moves", 100.0 * fraction, copy / 1e9)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        let s = Spread::of(vec![5.0, 1.0]);
        assert_eq!((s.min, s.max), (1.0, 5.0));
    }
}
