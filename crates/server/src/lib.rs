//! The HTTP server: an OpenAI-compatible API in the dialect of `vllm serve`, over whatever runs the model.
//!
//! A request's way: [`connection`](crate::Server) limits and timers → host check → key check → route → JSON, field by
//! field → chat template and tokenizer, then the grammar, on bounded blocking pools → [`Serving::submit`] → token events → text, stop
//! strings, tool calls → a JSON body or server-sent events.
//!
//! Invariants: [`Serving`] is the only door to the engine, and everything beyond it is token ids. Every request that
//! reaches a handler of the API ends in exactly one [`Outcome`]. No field of a request is ignored: it is obeyed, or the
//! request is refused with the field's name. A request's memory is bounded before it is taken.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod auth;
mod batch;
mod body;
mod choice;
mod config;
mod connection;
mod endpoint;
mod error;
mod handlers;
mod host;
mod ledger;
mod lifecycle;
mod log;
mod logprobs;
mod metrics;
mod openapi;
mod pipeline;
mod prompt;
mod quota;
mod record;
mod request;
mod response;
mod router;
mod server;
mod serving;
mod sse;
mod structured;
mod tls;
mod traces;
mod unread;

pub use auth::{ApiKeys, KeyError};
pub use batch::{BatchOptions, BatchStartError, Batchable, Batched, Defaults, QueueLimits, StepDevice};
pub use config::{Config, Cors, Limits, LogContent};
pub use endpoint::Endpoint;
pub use ledger::Outcome;
pub use lifecycle::{EngineLost, Lifecycle, Phase};
pub use log::{Level, Log, LogFormat, LogOptions, error, info, warn};
pub use longhaul_scheduler::NgramConfig;
pub use quota::KeyTerms;
pub use server::{Drained, Server, ServerError};
pub use serving::{
    Event, EventSink, EventStream, Failure, Finish, Grammar, Matcher, ModelInfo, Namespace, PREEMPTIONS,
    PromptToken, Refusal, STEP_ROWS, Sampling, Serving, Snapshot, SpeculationCounts, Submission, TokenScore,
    channel,
};
pub use tls::{Tls, TlsError};
pub use traces::{TraceError, Tracer};
