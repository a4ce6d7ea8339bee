//! Arguments of every command.

mod all_reduce;
mod bench;
mod generation;
mod logs;
mod nodes;
mod plan;
mod serve;
mod speculation;
mod values;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use longhaul_engine::{
    DEFAULT_GPU_MEMORY_UTILIZATION, Device, DeviceOptions, EmulatedOptions, EngineError, Kernels,
    KvCacheDtype, KvPool, LoadFormat, Loader, LongContext, ModelRef, Precision, SamplingParams,
};

use crate::exit;

pub use all_reduce::AllReduceArg;
pub use bench::{BenchArgs, BenchCommand, CollectivesArgs, ImplementationArg, KernelsArgs, LatencyArgs};
pub use generation::{GenerationArgs, GenerationConfigArg};
pub use nodes::NodesArgs;
pub use plan::{KvDType, PlanArgs, PlanDType};
pub use serve::{HttpArgs, JsonList, OnOffArg, PolicyArg, ServeArgs};
use values::{emulator_options, fraction, token_count};

/// Serves the Qwen2 family with exact long context.
#[derive(Debug, Parser)]
#[command(name = "longhaul", version, about, arg_required_else_help = true, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Ask(AskArgs),
    Bench(BenchArgs),
    Chat(ChatArgs),
    Detokenize(DetokenizeArgs),
    Generate(GenerateArgs),
    Logits(LogitsArgs),
    Models(ModelsArgs),
    Needle(NeedleArgs),
    Plan(PlanArgs),
    Serve(Box<ServeArgs>),
    Tokenize(TokenizeArgs),
}

/// Which model, and how it is loaded.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// demo (embedded), a directory, a hub id (org/name), or a family name such as qwen2-7b
    #[arg(long, default_value = "demo", value_name = "NAME|DIR")]
    pub model: String,
    /// dummy: random weights from a seed, no files needed
    #[arg(long, value_enum, default_value_t = LoadFormatArg::Auto)]
    pub load_format: LoadFormatArg,
    /// Where to run. auto: CUDA devices if there is one for each rank of --tp, else the CPU. cuda:N: devices from that number on.
    /// emulated: the CUDA kernels on the CPU, slow, for tests
    #[arg(long, value_parser = device, default_value = "auto", value_name = "auto|cpu|cuda[:N]|emulated")]
    pub device: Device,
    /// Which CUDA kernels run: the fastest that take the shape, the plain reference ones, or mma.sync ones
    #[arg(long, value_enum, default_value_t = KernelsArg::Auto)]
    pub kernels: KernelsArg,
    /// Run CUDA decode steps op by op instead of replaying recorded graphs
    #[arg(long)]
    pub enforce_eager: bool,
    /// How the emulated device schedules, such as seed=3,copies=lazy,blocks=2
    #[arg(long, env = "LONGHAUL_EMULATOR", value_parser = emulator_options, value_name = "KEY=VALUE,…", default_value = "")]
    pub emulator: EmulatedOptions,
    /// Precision of products and, unless --kv-cache-dtype says otherwise, of the KV cache. auto: bfloat16 on a CUDA device,
    /// and for ask, chat, needle and serve where the checkpoint is bfloat16 and the CPU has bf16 dot products; float32, exact,
    /// everywhere else
    #[arg(long, value_enum, default_value_t = DTypeArg::Auto)]
    pub dtype: DTypeArg,
    /// Element type of the KV cache. auto: that of --dtype. fp8_e4m3 (or fp8): one byte an element, all scales 1, CUDA
    /// devices only; its attention runs on the plain kernels, which are slower
    #[arg(long, value_enum, default_value_t = KvCacheDtypeArg::Auto)]
    pub kv_cache_dtype: KvCacheDtypeArg,
    /// Ranks that the model is dealt over, each with its shard of the weights and of the KV cache: a CUDA device each, or
    /// threads of the CPU. `longhaul plan` shows the shards
    #[arg(
        long,
        visible_alias = "tensor-parallel-size",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=64),
        value_name = "N"
    )]
    pub tp: u8,
    /// Deal routed experts whole over the ranks instead of cutting each by columns
    #[arg(long, visible_alias = "enable-expert-parallel")]
    pub expert_parallel: bool,
    /// How partial sums of ranks on CUDA devices come together. peer: our kernels, where the devices map each other's memory.
    /// nccl: NVIDIA's library. host: through the host's memory, works everywhere, slow. auto: the first of these that works
    #[arg(long, value_enum, default_value_t = AllReduceArg::Auto)]
    pub all_reduce: AllReduceArg,
    /// Run steps of at least N rows (prefill) in two halves: while the ranks sum one, they compute the other. CPU ranks
    /// only; the same bits; 0 = never
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub overlap_prefill_rows: usize,
    /// CPU threads of this node's ranks together; 0 = all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Fraction of a CUDA device's memory up to which it may be filled
    #[arg(long, value_parser = fraction, default_value_t = DEFAULT_GPU_MEMORY_UTILIZATION, value_name = "FRACTION")]
    pub gpu_memory_utilization: f32,
    /// Tokens of prompt and output that fit, such as 131072 or 128k [default: what the checkpoint says, less where the
    /// memory does not hold it]
    #[arg(long, value_parser = token_count, value_name = "TOKENS")]
    pub max_model_len: Option<usize>,
    /// How to read beyond the trained window: dca, yarn or none [default: what the checkpoint says, else dca as soon as
    /// the context exceeds the window; needle compares none,dca]
    #[arg(long, value_name = "dca|yarn|none", value_delimiter = ',')]
    pub long_context: Vec<LongContext>,
    /// Never use the network
    #[arg(long, env = "LONGHAUL_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
    /// Seed of dummy weights
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub dummy_seed: u64,
    #[command(flatten)]
    pub nodes: NodesArgs,
}

impl ModelArgs {
    /// The loader that these arguments describe; `auto` is what `--dtype auto` means to the command.
    ///
    /// # Errors
    /// A model name that means nothing; nodes that are not described whole.
    pub fn loader(&self, auto: Precision) -> Result<Loader, EngineError> {
        if self.long_context.len() > 1 {
            return Err(EngineError::Parameter {
                name: "--long-context",
                message: "takes one mode here; needle compares several".into(),
            });
        }
        Ok(Loader {
            model: ModelRef::parse(&self.model)?,
            load_format: match self.load_format {
                LoadFormatArg::Auto => LoadFormat::Auto,
                LoadFormatArg::Dummy => LoadFormat::Dummy,
            },
            device: DeviceOptions {
                device: self.device,
                precision: match self.dtype {
                    DTypeArg::Auto => auto,
                    DTypeArg::Float32 => Precision::Float32,
                    DTypeArg::Bfloat16 => Precision::Bfloat16,
                },
                kv_cache_dtype: self.kv_cache_dtype.into(),
                kv_pool: KvPool::default(),
                max_sequences: None,
                max_step_rows: None,
                threads: self.threads,
                tensor_parallel: self.tp.into(),
                expert_parallel: self.expert_parallel,
                all_reduce: self.all_reduce.into(),
                overlap_prefill_rows: NonZeroUsize::new(self.overlap_prefill_rows),
                kernels: self.kernels.into(),
                enforce_eager: self.enforce_eager,
                emulator: self.emulator,
                gpu_memory_utilization: self.gpu_memory_utilization,
                step_timeout: self.nodes.step_timeout,
                group_lost: exit::group_lost,
            },
            max_model_len: self.max_model_len,
            long_context: self.long_context.first().copied(),
            dummy_seed: self.dummy_seed,
            offline: self.offline,
            nodes: self.nodes.options()?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormatArg {
    #[value(alias = "safetensors")]
    Auto,
    Dummy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KernelsArg {
    Auto,
    Plain,
    Mma,
}

/// `auto`, `cpu`, `cuda`, `cuda:N` or `emulated`.
pub fn device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda(0)),
        "emulated" => Ok(Device::Emulated),
        other => other
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .map(Device::Cuda)
            .ok_or_else(|| "expected auto, cpu, cuda, cuda:N (such as cuda:1) or emulated".into()),
    }
}

impl From<KernelsArg> for Kernels {
    fn from(kernels: KernelsArg) -> Self {
        match kernels {
            KernelsArg::Auto => Kernels::Auto,
            KernelsArg::Plain => Kernels::Plain,
            KernelsArg::Mma => Kernels::Mma,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    Auto,
    #[value(aliases = ["f32", "float"])]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtypeArg {
    Auto,
    #[value(alias = "f32")]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(name = "fp8_e4m3", alias = "fp8")]
    Fp8E4m3,
}

impl From<KvCacheDtypeArg> for KvCacheDtype {
    fn from(dtype: KvCacheDtypeArg) -> Self {
        match dtype {
            KvCacheDtypeArg::Auto => KvCacheDtype::Auto,
            KvCacheDtypeArg::Float32 => KvCacheDtype::Float32,
            KvCacheDtypeArg::Bfloat16 => KvCacheDtype::Bfloat16,
            KvCacheDtypeArg::Fp8E4m3 => KvCacheDtype::Fp8E4m3,
        }
    }
}

/// How tokens are drawn. What is not given comes from the checkpoint's generation_config.json.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 = always the most likely token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Draw from the K most likely tokens; 0 = all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Draw from the most likely tokens that reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this fraction of the most likely one
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Penalty on every token of prompt and output; 1 = off
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from generated tokens
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtracted from generated tokens per occurrence
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// The same seed and prompt give the same tokens
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Text that ends the output; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Tokens of a prefill step [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub chunk: Option<usize>,
}

impl SamplingArgs {
    /// `defaults` with what was given on top.
    pub fn over(&self, defaults: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed,
        }
    }
}

/// Answer a question from documents, with the passage the answer rests on
#[derive(Debug, Args)]
#[command(after_help = "Example: longhaul ask --document report.txt \"What is the secret code of Lisbon?\"")]
pub struct AskArgs {
    /// Text, Markdown or PDF files; may be given several times
    #[arg(long, short, required = true, num_args = 1.., value_name = "FILE")]
    pub document: Vec<PathBuf>,
    /// The question; the last argument
    #[arg(value_name = "QUESTION")]
    pub question: Option<String>,
    /// Most tokens of the answer
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_tokens: usize,
    /// System message [default: the chat template's own]
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Complete a prompt
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The prompt, as text (no chat template)
    #[arg(long, value_name = "TEXT", required_unless_present = "ids_file", conflicts_with = "ids_file")]
    pub prompt: Option<String>,
    /// The prompt, as a JSON array of token ids
    #[arg(long, value_name = "FILE")]
    pub ids_file: Option<PathBuf>,
    /// Most tokens to generate [default: the checkpoint's max_new_tokens, else 256]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub ignore_eos: bool,
    /// Read special tokens in the prompt (such as <|im_start|>) as control tokens instead of as text
    #[arg(long)]
    pub parse_special: bool,
    /// One JSON object on stdout: ids, text, finish_reason, timings
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Talk to a model in the terminal
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// System message [default: the chat template's own]
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub max_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Write the logits of every position to a safetensors file: the parity tool
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The prompt, as a JSON array of token ids
    #[arg(long, value_name = "FILE")]
    pub ids_file: PathBuf,
    /// File to write: tensor `logits`, float32, [tokens, vocab]
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
    /// Tokens of a prefill step [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub chunk: Option<usize>,
    /// One JSON object on stdout: tokens, vocab, seconds
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// The family table, computed: parameters, weights, KV cache, context
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// Never use the network
    #[arg(long, env = "LONGHAUL_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
    /// Only this model: a family name, demo, a directory or a hub id
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    /// A JSON array on stdout
    #[arg(long)]
    pub json: bool,
}

/// Needle in a haystack: lengths × depths, as a heat map, for one or several long-context modes
#[derive(Debug, Args)]
#[command(
    after_help = "Example: longhaul needle --lengths 768,1536,3072,6144 --long-context none,dca --out needle"
)]
pub struct NeedleArgs {
    /// Prompt lengths in tokens [default: 1, 2, 4 and 8 times the trained window, as far as the model goes]
    #[arg(long, value_parser = token_count, value_delimiter = ',', value_name = "TOKENS,…")]
    pub lengths: Vec<usize>,
    /// Depths of the needle in percent
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0,10,20,30,40,50,60,70,80,90,100",
        value_name = "PERCENT,…"
    )]
    pub depths: Vec<f32>,
    /// Needles per length and depth, each in another stretch of the haystack
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub instances: usize,
    /// Text to hide the needle in [default: a built-in novel]
    #[arg(long, value_name = "FILE")]
    pub haystack: Option<PathBuf>,
    /// The sentence to hide; {city} and {code} stand for a name and a number drawn per cell
    #[arg(long, value_name = "TEXT")]
    pub needle: Option<String>,
    /// The question
    #[arg(long, value_name = "TEXT")]
    pub question: Option<String>,
    /// What the answer must contain; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub expect: Vec<String>,
    /// Ask every question without its needle too: shows that the answer cannot be guessed
    #[arg(long)]
    pub control: bool,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub max_tokens: usize,
    /// Seed of names, numbers and stretches
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Tokens of a prefill step [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub chunk: Option<usize>,
    /// Folder for results.jsonl, report.json, needle.html and needle.svg; an interrupted run continues here
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Start over in a folder that holds another run
    #[arg(long, requires = "out")]
    pub overwrite: bool,
    /// The report as one JSON object on stdout instead of the heat map
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Text to token ids
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// The text [default: stdin]
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    pub text: Option<String>,
    /// Read the text from a file
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Never use the network
    #[arg(long, env = "LONGHAUL_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
    /// Read special tokens in the text as control tokens
    #[arg(long)]
    pub parse_special: bool,
    /// A JSON object with ids, count and the text of every token
    #[arg(long)]
    pub json: bool,
    /// demo, a directory or a hub id
    #[arg(long, default_value = "demo", value_name = "NAME|DIR")]
    pub model: String,
}

/// Token ids to text
#[derive(Debug, Args)]
pub struct DetokenizeArgs {
    /// Token ids [default: a JSON array on stdin]
    #[arg(value_name = "ID", conflicts_with = "ids_file")]
    pub ids: Vec<u32>,
    /// A JSON array of token ids
    #[arg(long, value_name = "FILE")]
    pub ids_file: Option<PathBuf>,
    /// Never use the network
    #[arg(long, env = "LONGHAUL_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub offline: bool,
    /// Leave special tokens out
    #[arg(long)]
    pub skip_special: bool,
    /// A JSON object with the text
    #[arg(long)]
    pub json: bool,
    /// demo, a directory or a hub id
    #[arg(long, default_value = "demo", value_name = "NAME|DIR")]
    pub model: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_have_names_and_ordinals() {
        for (text, expected) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
            ("emulated", Device::Emulated),
        ] {
            assert_eq!(device(text), Ok(expected));
        }
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA"] {
            assert!(device(bad).is_err(), "{bad}");
        }
    }
}
