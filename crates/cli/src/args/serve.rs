use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use longhaul_server::NgramConfig;

use super::ModelArgs;
use super::generation::GenerationArgs;
use super::logs::LogArgs;
use super::speculation::speculation;

/// Serve the OpenAI API over HTTP
#[derive(Debug, Args)]
#[command(after_help = "Example: longhaul serve --model demo --port 8000\n\
    Keys come from --api-key-file, or from LONGHAUL_API_KEY or VLLM_API_KEY (one key), never from the command line.")]
pub struct ServeArgs {
    /// The same as --model
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    pub model_tag: Option<String>,
    /// Flags that were given and have no effect, with the reason
    #[arg(skip)]
    pub warnings: Vec<String>,
    #[command(flatten)]
    pub http: HttpArgs,
    #[command(flatten)]
    pub batch: BatchArgs,
    #[command(flatten)]
    pub queue: QueueArgs,
    #[command(flatten)]
    pub generation: GenerationArgs,
    #[command(flatten)]
    pub logs: LogArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Address or name to listen on. Anything but a loopback address needs API keys or --allow-unauthenticated
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    pub host: String,
    /// Port to listen on; 0 = a free one, which is printed
    #[arg(long, default_value_t = 8000, value_name = "PORT")]
    pub port: u16,
    /// Listen on a socket in the file system instead; who may open the file may call
    #[arg(long, value_name = "PATH", conflicts_with_all = ["host", "port"])]
    pub uds: Option<PathBuf>,
    /// Speak TLS, with the certificate chain of this PEM file, the server's own certificate first
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// The certificate's private key, PEM [default: in the file of --ssl-certfile]
    #[arg(long, value_name = "FILE", requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Names of the model in the API; the first is the one in answers [default: what --model says]
    #[arg(long, num_args = 1.., value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// API keys, one a line, each with what its owner may ask for: KEY [name=NAME] [rpm=N] [tpm=N] [concurrent=N]
    /// [priority=N], which are its name in the log, requests and tokens a minute, requests at a time, and what is added to
    /// their priority; # begins a comment line
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve everybody who reaches the port
    #[arg(long)]
    pub allow_unauthenticated: bool,
    /// A path that proxies put before every route, such as /llm
    #[arg(long, default_value = "", value_parser = root_path, value_name = "PATH")]
    pub root_path: String,
    /// Origins whose pages may call the API from a browser, a JSON list such as `["https://chat.example"]`, or `["*"]` for all
    #[arg(long, value_parser = header_values, default_value = "[]", value_name = "JSON")]
    pub allowed_origins: JsonList,
    /// Methods that such pages may use [default: ["GET", "POST"]]
    #[arg(long, value_parser = header_values, default_value = "[]", value_name = "JSON")]
    pub allowed_methods: JsonList,
    /// Headers that such pages may send [default: all]
    #[arg(long, value_parser = header_values, default_value = "[]", value_name = "JSON")]
    pub allowed_headers: JsonList,
    /// Such pages may send what the browser has stored for this server; not with all origins
    #[arg(long)]
    pub allow_credentials: bool,
    /// Names that requests may be addressed to, in their Host header [default: any; on a loopback address without keys
    /// localhost, 127.0.0.1 and ::1]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub allowed_hosts: Vec<String>,
    /// Send X-Request-Id back
    #[arg(long)]
    pub enable_request_id_headers: bool,
    /// Send the usage with every stream and every chunk of it, asked for or not
    #[arg(long)]
    pub enable_force_include_usage: bool,
    /// Report cached prompt tokens in the usage
    #[arg(long)]
    pub enable_prompt_tokens_details: bool,
    /// Send a comment into a stream that was silent for so long; 0 = never
    #[arg(long, value_parser = seconds, default_value = "0", value_name = "SECONDS")]
    pub sse_keep_alive_interval: Duration,
    /// Role of the answers of chats
    #[arg(long, default_value = "assistant", value_name = "ROLE")]
    pub response_role: String,
    /// How tool calls are written by the model; they are parsed whenever a chat brings tools
    #[arg(long, value_enum, default_value_t = ToolCallParserArg::Hermes)]
    pub tool_call_parser: ToolCallParserArg,
    /// Open connections; more wait
    #[arg(long, default_value_t = 4096, value_parser = positive, value_name = "N")]
    pub max_connections: usize,
    /// Time between two requests of a connection
    #[arg(long, value_parser = seconds, default_value = "75", env = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", value_name = "SECONDS")]
    pub keep_alive_timeout: Duration,
    /// Longest request, waiting and running; 0 = no limit
    #[arg(long, value_parser = seconds, default_value = "0", value_name = "SECONDS")]
    pub request_timeout: Duration,
    /// After SIGTERM, go on accepting for so long while /ready already says no
    #[arg(long, value_parser = seconds, default_value = "0", value_name = "SECONDS")]
    pub drain_delay: Duration,
    /// Time that running requests then have; a second SIGTERM cuts it short
    #[arg(long, value_parser = seconds, default_value = "30", value_name = "SECONDS")]
    pub shutdown_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Batching")]
pub struct BatchArgs {
    /// Sequences that run at a time
    #[arg(long, value_parser = positive, default_value_t = 256, value_name = "N")]
    pub max_num_seqs: usize,
    /// Rows of a step: tokens that decode and tokens of prompts. More than --max-num-seqs [default: what suits the device]
    #[arg(long, value_parser = positive, value_name = "N")]
    pub max_num_batched_tokens: Option<usize>,
    /// Tokens of prompts in a step in which others decode: less is smoother, more is faster to the first token
    #[arg(long, value_parser = positive, default_value_t = 512, value_name = "N")]
    pub max_mixed_prefill_tokens: usize,
    /// Plan the next step while one runs: auto where the device leaves the CPU alone
    #[arg(
        long,
        value_enum,
        default_value_t = OnOffArg::Auto,
        num_args = 0..=1,
        default_missing_value = "on",
        value_name = "auto|on|off"
    )]
    pub async_scheduling: OnOffArg,
    /// Speculative decoding: tokens are guessed from what followed the same words before, and computed together. The output is the
    /// same; it pays where answers repeat their prompt. JSON: {"method": "ngram", "num_speculative_tokens": 5,
    /// "prompt_lookup_max": 5, "prompt_lookup_min": 5}, of which the last two may be left out
    #[arg(long, value_parser = speculation, value_name = "JSON")]
    pub speculative_config: Option<NgramConfig>,
    /// Who waits is served by `priority` of the request, lower first; fcfs: as they come, and a priority is refused
    #[arg(long, value_enum, default_value_t = PolicyArg::Priority)]
    pub scheduling_policy: PolicyArg,
    /// Keep KV blocks for prompts that begin alike: the default
    #[arg(long, conflicts_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Compute every prompt anew instead of keeping KV blocks for prompts that begin alike
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// KV blocks of the pool [default: what fits beside the model; on the CPU 4 GiB at most]
    #[arg(long, value_parser = positive, value_name = "N", conflicts_with = "kv_cache_memory_bytes")]
    pub num_gpu_blocks_override: Option<usize>,
    /// Bytes of the KV pool of all ranks that share a memory, else of each
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_cache_memory_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOffArg {
    Auto,
    On,
    Off,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Queue")]
pub struct QueueArgs {
    /// Requests that may wait; more are refused with 503
    #[arg(long, default_value_t = 1024, value_parser = positive, value_name = "N")]
    pub max_num_queued_reqs: usize,
    /// Requests of one API key that may wait; more are refused with 429 [default: no limit]
    #[arg(long, value_parser = positive, value_name = "N")]
    pub max_num_queued_reqs_per_key: Option<usize>,
    /// Prompt tokens that may wait; more are refused with 503 [default: no limit]
    #[arg(long, value_parser = positive, value_name = "TOKENS")]
    pub max_num_queued_tokens: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToolCallParserArg {
    Hermes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyArg {
    Fcfs,
    Priority,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a number of at least 1".into()),
    }
}

/// A number of seconds, up to a year.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=31_536_000.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds, such as 30 or 0.5".into()),
    }
}

/// A list of words, written as JSON.
#[derive(Debug, Clone, Default)]
pub struct JsonList(pub Vec<String>);

fn header_values(text: &str) -> Result<JsonList, String> {
    serde_json::from_str(text)
        .map(JsonList)
        .map_err(|_| "expected a JSON list of strings, such as [\"*\"]".into())
}

fn root_path(text: &str) -> Result<String, String> {
    let path = text.trim_end_matches('/');
    let plain = path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'%'));
    match path.is_empty() || (path.starts_with('/') && plain) {
        true => Ok(path.to_owned()),
        false => Err("expected a path such as /llm".into()),
    }
}
