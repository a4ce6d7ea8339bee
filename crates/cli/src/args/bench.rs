//! Arguments of `longhaul bench`.

use clap::{Args, Subcommand, ValueEnum};
use longhaul_bench::collectives::{ElementType, Operation};
use longhaul_engine::Device;

use super::values::token_count;
use super::{KernelsArg, ModelArgs, device};

/// Measurements, each beside its limit
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    Latency(Box<LatencyArgs>),
    Kernels(KernelsArgs),
    Collectives(CollectivesArgs),
    /// A rank of `collectives` that is a process
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    CollectivesRank,
}

/// Every CUDA kernel at the shapes of the five models, beside the limit it is a fraction of
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Where to run. emulated: bytes and operations are counted, nothing is launched
    #[arg(long, value_parser = device, default_value = "auto", value_name = "auto|cuda[:N]|emulated")]
    pub device: Device,
    /// Which kernels run
    #[arg(long, value_enum, default_value_t = KernelsArg::Auto)]
    pub kernels: KernelsArg,
    /// Only ops whose name contains this, such as attention
    #[arg(long, value_name = "TEXT")]
    pub op: Option<String>,
    /// Only this model, such as qwen2-7b
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// One request at a time: prefill and decode speed, decode as a fraction of the memory bandwidth
#[derive(Debug, Args)]
pub struct LatencyArgs {
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub input_len: u32,
    /// Tokens to generate
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    pub output_len: u32,
    /// Measured runs after one warm-up
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub runs: usize,
    /// Tokens of a prefill step [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub chunk: Option<usize>,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// Collective operations between ranks: latency, and bandwidth beside that of a copy
#[derive(Debug, Args)]
#[command(
    after_help = "Example: longhaul bench collectives --ranks 2,4 --operation all_reduce --sizes 4k,1m\n\n\
    Sizes and bandwidths are those of nccl-tests: the size is the whole message's, the bus bandwidth is comparable with the \
    bandwidth of a rank's link. The limit is what copies of that size allow, with a thread a rank. A rank holds up to \
    twice the largest size."
)]
pub struct CollectivesArgs {
    /// Ranks, up to 64 (peer: 2 to 16); several numbers are measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "2", value_parser = clap::value_parser!(u8).range(1..=64), value_name = "N,…")]
    pub ranks: Vec<u8>,
    /// Bytes of the whole message, multiples of 4, such as 4096, 256k or 64m
    #[arg(
        long,
        value_parser = message_bytes,
        value_delimiter = ',',
        default_value = "1k,4k,16k,64k,256k,1m,4m,16m,64m",
        value_name = "BYTES,…"
    )]
    pub sizes: Vec<usize>,
    /// The operations
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "all_reduce,all_gather,reduce_scatter,broadcast,barrier",
        hide_possible_values = true,
        value_name = "OPERATION,…"
    )]
    pub operation: Vec<OperationArg>,
    /// Types of the elements
    #[arg(long, value_enum, value_delimiter = ',', default_value = "float32,bfloat16")]
    pub dtype: Vec<ElementArg>,
    /// How data travels. threads, processes: over shared memory. peer: the CUDA kernels (all_reduce of float32 and
    /// bfloat16), all ranks on one device
    #[arg(long, value_enum, value_delimiter = ',', default_value = DEFAULT_IMPLEMENTATIONS)]
    pub implementation: Vec<ImplementationArg>,
    /// Device of the peer kernels. emulated: bytes are counted, nothing is launched
    #[arg(long, value_parser = device, default_value = "emulated", value_name = "auto|cuda[:N]|emulated")]
    pub device: Device,
    /// Seconds of samples of one operation on one message, at least 7 samples; not of the peer kernels
    #[arg(long, value_parser = seconds, default_value = "0.2", value_name = "SECONDS")]
    pub seconds: f64,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[cfg(target_os = "linux")]
const DEFAULT_IMPLEMENTATIONS: &str = "threads,processes";
#[cfg(not(target_os = "linux"))]
const DEFAULT_IMPLEMENTATIONS: &str = "threads";

/// `4096`, `256k` or `64m`, a multiple of 4 from 4 bytes to a GiB.
fn message_bytes(text: &str) -> Result<usize, String> {
    match token_count(text) {
        Ok(bytes) if (4..=1 << 30).contains(&bytes) && bytes % 4 == 0 => Ok(bytes),
        _ => Err("expected a multiple of 4 bytes up to 1024m, such as 4096, 256k or 64m".into()),
    }
}

/// From 0 to 600.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number of seconds from 0 to 600, such as 0.2".into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum OperationArg {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Barrier,
}

impl From<OperationArg> for Operation {
    fn from(operation: OperationArg) -> Self {
        match operation {
            OperationArg::AllReduce => Operation::AllReduce,
            OperationArg::AllGather => Operation::AllGather,
            OperationArg::ReduceScatter => Operation::ReduceScatter,
            OperationArg::Broadcast => Operation::Broadcast,
            OperationArg::Barrier => Operation::Barrier,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ElementArg {
    #[value(alias = "f32")]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "f16")]
    Float16,
    #[value(alias = "i32")]
    Int32,
}

impl From<ElementArg> for ElementType {
    fn from(element: ElementArg) -> Self {
        match element {
            ElementArg::Float32 => ElementType::Float32,
            ElementArg::Bfloat16 => ElementType::Bfloat16,
            ElementArg::Float16 => ElementType::Float16,
            ElementArg::Int32 => ElementType::Int32,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImplementationArg {
    Threads,
    #[cfg(target_os = "linux")]
    Processes,
    Peer,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole_words() {
        assert_eq!(message_bytes("256k"), Ok(256 << 10));
        assert_eq!(message_bytes("1024M"), Ok(1 << 30));
        for bad in ["0", "2", "1025m", "4097", "x", ""] {
            assert!(message_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn seconds_are_finite() {
        assert_eq!(seconds("0.05"), Ok(0.05));
        for bad in ["-1", "NaN", "inf", "601", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
