//! Arguments of `longhaul plan`.

use std::ops::RangeInclusive;

use clap::{Args, ValueEnum};

use super::token_count;

/// The shard plan: what every GPU holds, whether it fits and with how much context, how fast it is at best
#[derive(Debug, Args)]
#[command(after_help = "Example: longhaul plan --model qwen2-57b-a14b --gpus 8 --gpu-memory 80GiB\n\n\
    Speeds are limits, not forecasts: bytes over bandwidth or operations over throughput, whichever is more, plus the \
    all-reduces. Beyond 8 GPUs the cost of an all-reduce is extrapolated.")]
pub struct PlanArgs {
    /// A family name such as qwen2-72b, demo, a directory or a hub id
    #[arg(long, value_name = "NAME|DIR")]
    pub model: String,
    /// GPUs: a number, or a range such as 1..16 for one line each
    #[arg(long, value_parser = gpu_range, value_name = "N|A..B")]
    pub gpus: RangeInclusive<usize>,
    /// Memory of one GPU, such as 80GiB [default: an H200's 143771 MiB]
    #[arg(long, value_parser = byte_count, default_value = "143771MiB", hide_default_value = true, value_name = "BYTES")]
    pub gpu_memory: u64,
    /// Part of the memory that weights and KV cache may take; the rest is for a step's temporaries and the driver
    #[arg(long, value_parser = fraction, default_value = "0.92", value_name = "FRACTION")]
    pub gpu_memory_utilization: f64,
    /// How the weights are stored, for the shard table and the speeds
    #[arg(long, value_enum, default_value_t = PlanDType::Bfloat16)]
    pub dtype: PlanDType,
    /// How the KV cache is stored
    #[arg(long, value_enum, default_value_t = KvDType::Bfloat16)]
    pub kv_cache_dtype: KvDType,
    /// Tokens of context that are asked for, such as 131072 or 128k [default: the model's context]
    #[arg(long, value_parser = token_count, value_name = "TOKENS")]
    pub max_model_len: Option<usize>,
    /// Deal routed experts whole instead of cutting each by columns
    #[arg(long)]
    pub expert_parallel: bool,
    /// Sequences that decode together, for the speed
    #[arg(long, default_value_t = 1, value_parser = positive, value_name = "N")]
    pub batch: usize,
    /// Cached tokens of each of them, for the speed
    #[arg(long, default_value = "2048", value_parser = token_count, value_name = "TOKENS")]
    pub context: usize,
    /// Tokens of a prompt chunk, for the speed
    #[arg(long, default_value_t = 2048, value_parser = positive, value_name = "TOKENS")]
    pub chunk: usize,
    /// Memory bandwidth of a GPU in TB/s; the default is what a copy reaches on an H200
    #[arg(long, default_value = "4.3", value_parser = above_zero, value_name = "TB/S")]
    pub gpu_bandwidth: f64,
    /// bfloat16 throughput of a GPU in TFLOP/s; the default is what a matrix product reaches on an H200
    #[arg(long, default_value = "790", value_parser = above_zero, value_name = "TFLOP/S")]
    pub gpu_tflops: f64,
    /// fp8 throughput of a GPU in TFLOP/s; the default is assumed
    #[arg(long, default_value = "1500", value_parser = above_zero, value_name = "TFLOP/S")]
    pub gpu_fp8_tflops: f64,
    /// Bandwidth between GPUs in GB/s, one direction [default: public figures of all-reduces over NVLink]
    #[arg(long, value_parser = above_zero, requires = "link_latency", value_name = "GB/S")]
    pub link_bandwidth: Option<f64>,
    /// Latency of an all-reduce in microseconds [default: as above]
    #[arg(long, value_parser = above_zero, requires = "link_bandwidth", value_name = "US")]
    pub link_latency: Option<f64>,
    /// Never use the network
    #[arg(long, env = "LONGHAUL_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlanDType {
    #[value(alias = "bf16")]
    Bfloat16,
    Fp8,
    #[value(name = "int4-g128", alias = "int4")]
    Int4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDType {
    #[value(alias = "bf16")]
    Bfloat16,
    Fp8,
}

/// `8`, or `1..16` with both ends.
fn gpu_range(text: &str) -> Result<RangeInclusive<usize>, String> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|n| (1..=1024).contains(n));
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err("expected a number of GPUs from 1 to 1024, or a range such as 1..16".into()),
    }
}

/// `80GiB`, `80GB`, `143771MiB` or a number of bytes.
fn byte_count(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("b", 1),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let unit = UNITS.iter().find_map(|(name, unit)| Some((lower.strip_suffix(name)?, *unit)));
    let (number, unit) = unit.unwrap_or((lower.as_str(), 1));
    let bytes = number.trim().parse::<f64>().ok().map(|n| n * unit as f64);
    match bytes {
        Some(bytes) if bytes >= 1.0 && bytes < (1u64 << 60) as f64 => Ok(bytes as u64),
        _ => Err("expected a size such as 80GiB, 80GB or 143771MiB".into()),
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|v| *v > 0.0 && *v <= 1.0);
    value.ok_or_else(|| "expected a fraction above 0 and up to 1".into())
}

fn above_zero(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|v| *v > 0.0 && v.is_finite());
    value.ok_or_else(|| "expected a number above 0".into())
}

fn positive(text: &str) -> Result<usize, String> {
    match token_count(text) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("expected a number above 0, such as 1, 2048 or 32k".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_ranges() {
        assert_eq!(gpu_range("8"), Ok(8..=8));
        assert_eq!(gpu_range("1..16"), Ok(1..=16));
        for bad in ["0", "", "..", "4..2", "1..", "1..2000", "a..b", "1..2..3"] {
            assert!(gpu_range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn byte_counts() {
        assert_eq!(byte_count("80GiB"), Ok(80 << 30));
        assert_eq!(byte_count("80 gb"), Ok(80_000_000_000));
        assert_eq!(byte_count("143771MiB"), Ok(143_771 << 20));
        assert_eq!(byte_count("1.5kib"), Ok(1536));
        assert_eq!(byte_count("512"), Ok(512));
        assert_eq!(byte_count("512B"), Ok(512));
        for bad in ["", "GiB", "-1GiB", "0", "nanGiB", "1e40GiB", "80 pounds"] {
            assert!(byte_count(bad).is_err(), "{bad}");
        }
    }
}
