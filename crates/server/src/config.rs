//! What an operator decides.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method};
use serde_json::{Map, Value};

use crate::auth::ApiKeys;
use crate::tls::Tls;
use crate::traces::Tracer;

/// Settings of a server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Names under which the model is served; the first is the one in answers. Empty: the model's own name.
    pub served_model_names: Vec<String>,
    /// Keys that may call the API; empty = everybody may.
    pub api_keys: ApiKeys,
    /// Serve everybody on an address that other machines reach, without keys.
    pub allow_unauthenticated: bool,
    /// Speak TLS, with this certificate.
    pub tls: Option<Tls>,
    /// A path that may stand before every route, as proxies add it; empty = none.
    pub root_path: String,
    /// Pages that may call the API from a browser; empty = none.
    pub cors: Cors,
    /// Variables of the chat template that requests may override.
    pub template_variables: Map<String, Value>,
    /// Show tokens as `token_id:N`, asked for or not.
    pub tokens_as_ids: bool,
    /// Host names that requests may be addressed to; empty = any, but on a loopback address without keys only that machine's
    /// own names, so that no web page can call the API through a name of its own.
    pub allowed_hosts: Vec<String>,
    /// Send `X-Request-Id` back.
    pub request_id_headers: bool,
    /// Send the usage with every stream, asked for or not.
    pub force_include_usage: bool,
    /// Report cached prompt tokens in the usage.
    pub prompt_tokens_details: bool,
    /// Time between keep-alive comments of an idle stream; none = no comments.
    pub sse_keep_alive: Option<Duration>,
    /// Role of the answers of chats.
    pub response_role: String,
    /// Go on accepting after the first signal to end, until routers have noticed.
    pub drain_delay: Duration,
    /// Time that running requests have after that.
    pub drain_timeout: Duration,
    /// What the log tells of requests.
    pub log: LogContent,
    /// Lines of the log that were dropped, for the metrics.
    pub log_drops: Option<Arc<AtomicU64>>,
    /// Send a span for every request that reached the engine.
    pub tracer: Option<Tracer>,
    /// Bounds of what a client may ask for.
    pub limits: Limits,
}

/// Pages of other origins that may call the API from a browser. `*` stands for all.
#[derive(Debug, Clone, Default)]
pub struct Cors {
    /// Origins, such as `https://chat.example`; empty = no page of another origin.
    pub origins: Vec<HeaderValue>,
    /// Methods; empty = those that there are.
    pub methods: Vec<Method>,
    /// Headers of requests; empty = all.
    pub headers: Vec<HeaderName>,
    /// Whether pages may send what a browser has stored for this server. Not with all origins.
    pub credentials: bool,
}

/// What the log tells of requests, beyond one record of each without what was said.
#[derive(Debug, Clone)]
pub struct LogContent {
    /// Prompts and parameters.
    pub requests: bool,
    /// Answers.
    pub outputs: bool,
    /// Most characters of a prompt or an answer.
    pub max_len: usize,
    /// Routes without records.
    pub silent_routes: Vec<String>,
}

impl Default for LogContent {
    fn default() -> Self {
        Self { requests: false, outputs: false, max_len: 2048, silent_routes: Vec::new() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            served_model_names: Vec::new(),
            api_keys: ApiKeys::default(),
            allow_unauthenticated: false,
            tls: None,
            root_path: String::new(),
            cors: Cors::default(),
            template_variables: Map::new(),
            tokens_as_ids: false,
            allowed_hosts: Vec::new(),
            request_id_headers: false,
            force_include_usage: false,
            prompt_tokens_details: false,
            sse_keep_alive: None,
            response_role: "assistant".into(),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            log: LogContent::default(),
            log_drops: None,
            tracer: None,
            limits: Limits::default(),
        }
    }
}

/// Bounds of what a client may ask for. The defaults are far above what applications send and far below what hurts.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections open at once; more wait in the listener's backlog.
    pub connections: usize,
    /// Time for the handshake of TLS.
    pub handshake_time: Duration,
    /// Time for the head of a request, from its first byte on; of the first request, from the connection's beginning.
    pub header_time: Duration,
    /// Time between two requests of a connection.
    pub keep_alive: Duration,
    /// Time without a byte of a body.
    pub body_idle: Duration,
    /// Time for a whole body.
    pub body_time: Duration,
    /// Time in which a client takes no byte of an answer.
    pub write_time: Duration,
    /// Largest body, whatever the model's context.
    pub body_bytes: usize,
    /// Bytes of all bodies being read and parsed together.
    pub inflight_body_bytes: usize,
    /// Choices of a request.
    pub n: u32,
    /// Prompts of a completion request.
    pub prompts: usize,
    /// Stop strings of a request.
    pub stops: usize,
    /// Entries of `bad_words`.
    pub bad_words: usize,
    /// Entries of `logit_bias`.
    pub logit_bias: usize,
    /// Messages of a chat.
    pub messages: usize,
    /// Tools of a chat.
    pub tools: usize,
    /// Texts being tokenized at once.
    pub tokenizing: usize,
    /// Grammars being compiled at once.
    pub compiling: usize,
    /// Longest time that a request's grammar may take to compile.
    pub compile_time: Duration,
    /// Events of a request that wait for its reader.
    pub queued_events: usize,
    /// Longest time of a request, in the queue and running; none = no limit.
    pub request_time: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshake_time: Duration::from_secs(10),
            header_time: Duration::from_secs(10),
            // Longer than the 60 s of common load balancers: who closes first may lose a request.
            keep_alive: Duration::from_secs(75),
            body_idle: Duration::from_secs(15),
            body_time: Duration::from_secs(60),
            write_time: Duration::from_secs(30),
            body_bytes: 32 << 20,
            inflight_body_bytes: 256 << 20,
            n: 16,
            prompts: 64,
            stops: 4,
            bad_words: 128,
            logit_bias: 1024,
            messages: 1024,
            tools: 128,
            tokenizing: std::thread::available_parallelism().map_or(1, usize::from),
            compiling: std::thread::available_parallelism().map_or(1, usize::from),
            compile_time: Duration::from_secs(10),
            queued_events: 4096,
            request_time: None,
        }
    }
}

impl Limits {
    /// Largest body for a model with a context of `max_model_len` tokens: six bytes a token and a mebibyte of JSON.
    pub fn body_limit(&self, max_model_len: usize) -> usize {
        self.body_bytes.min(max_model_len.saturating_mul(6).saturating_add(1 << 20))
    }
}
