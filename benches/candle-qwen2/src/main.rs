//! Times candle-transformers' Qwen2 on the CPU: the baseline that `longhaul bench latency` is compared with.
//!
//! The model has the shape of Qwen2-0.5B and random weights (speed does not depend on their values), so nothing is
//! downloaded. One repetition is a prefill of the prompt, with the logits of its last token only, followed by greedy
//! decoding of one token at a time over the model's own key-value cache. The median of the repetitions after a warm-up
//! is reported, as JSON on stdout. `transformers_cpu.py` beside this folder does the same with transformers.
//!
//! `RAYON_NUM_THREADS` sets the number of threads: candle reads it for its matrix products, Rayon for its pool.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Activation, Init, VarBuilder};
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use clap::{Parser, ValueEnum};
use serde::Serialize;

/// The versions that `Cargo.lock` pins.
const CANDLE_VERSION: &str = "0.11.1";

/// Time candle-transformers' Qwen2-0.5B with random weights on the CPU.
#[derive(Debug, Parser)]
struct Arguments {
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=16384))]
    input_len: u32,
    /// Tokens decoded after the prompt.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=16384))]
    output_len: u32,
    /// Measured repetitions.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(3..))]
    repeats: u32,
    /// Element types of weights and activations, one measurement each.
    #[arg(long, value_enum, num_args = 1.., default_values = ["float32", "bfloat16"])]
    dtypes: Vec<Precision>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Precision {
    Float32,
    Bfloat16,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        }
    }

    fn dtype(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::BF16,
        }
    }
}

/// Medians over the repetitions, and every single one of them.
#[derive(Debug, Serialize)]
struct Measurement {
    dtype: &'static str,
    repeats: u32,
    prefill_tok_s: f64,
    decode_tok_s: f64,
    prefill_s: Vec<f64>,
    decode_s: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    engine: &'static str,
    versions: BTreeMap<&'static str, &'static str>,
    model: &'static str,
    threads: usize,
    input_len: u32,
    output_len: u32,
    results: BTreeMap<&'static str, Measurement>,
}

/// Gives every weight its values: normal of deviation 0.02, and ones for the norms. There is no `lm_head`: it is tied.
struct RandomWeights;

impl SimpleBackend for RandomWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if name.contains("norm") {
            Tensor::ones(shape, dtype, device)
        } else {
            Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype)
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("the model asked for '{name}' without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !name.starts_with("lm_head.")
    }
}

/// The published shape of Qwen2-0.5B; the position table covers what a run needs.
fn qwen2_0_5b(positions: usize) -> Config {
    Config {
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4_864,
        num_hidden_layers: 24,
        num_attention_heads: 14,
        num_key_value_heads: 2,
        max_position_embeddings: positions,
        sliding_window: positions,
        max_window_layers: 24,
        tie_word_embeddings: true,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

/// The most likely token after the last position, as the [1, 1] input of the next step.
fn greedy(logits: &Tensor) -> candle_core::Result<Tensor> {
    logits.squeeze(1)?.argmax_keepdim(D::Minus1)
}

fn median(values: &[f64]) -> Result<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2).context("no repetition was measured")?;
    let lower = *sorted.get((sorted.len().saturating_sub(1)) / 2).context("no repetition was measured")?;
    Ok((lower + upper) / 2.0)
}

fn measure(precision: Precision, arguments: &Arguments) -> Result<Measurement> {
    let device = Device::Cpu;
    let positions = usize::try_from(arguments.input_len + arguments.output_len)?;
    let weights = VarBuilder::from_backend(Box::new(RandomWeights), precision.dtype(), device.clone());
    let mut model = ModelForCausalLM::new(&qwen2_0_5b(positions), weights)?;
    let ids: Vec<u32> = (0..arguments.input_len).map(|i| i.wrapping_mul(2_654_435_761) % 151_000).collect();
    let prompt = Tensor::new(ids, &device)?.unsqueeze(0)?;

    let (mut prefill_s, mut decode_s) = (Vec::new(), Vec::new());
    for repetition in 0..=arguments.repeats {
        model.clear_kv_cache();
        let start = Instant::now();
        let mut token = greedy(&model.forward(&prompt, 0)?)?;
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for step in 0..arguments.output_len {
            let position = usize::try_from(arguments.input_len + step)?;
            token = greedy(&model.forward(&token, position)?)?;
        }
        let decode = start.elapsed().as_secs_f64();
        ensure!(
            token.dims() == [1, 1],
            "a step returned tokens of shape {:?}, expected [1, 1]",
            token.dims()
        );
        let label = if repetition == 0 { "warm-up".to_owned() } else { repetition.to_string() };
        eprintln!("{} {label}: prefill {prefill:.3} s, decode {decode:.3} s", precision.name());
        if repetition > 0 {
            prefill_s.push(prefill);
            decode_s.push(decode);
        }
    }
    Ok(Measurement {
        dtype: precision.name(),
        repeats: arguments.repeats,
        prefill_tok_s: f64::from(arguments.input_len) / median(&prefill_s)?,
        decode_tok_s: f64::from(arguments.output_len) / median(&decode_s)?,
        prefill_s,
        decode_s,
    })
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut results = BTreeMap::new();
    for &precision in &arguments.dtypes {
        results.insert(precision.name(), measure(precision, &arguments)?);
    }
    let report = Report {
        engine: "candle-transformers",
        versions: BTreeMap::from([("candle-transformers", CANDLE_VERSION)]),
        model: "qwen2-0.5b",
        threads: candle_core::utils::get_num_threads(),
        input_len: arguments.input_len,
        output_len: arguments.output_len,
        results,
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
