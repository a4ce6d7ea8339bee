//! Constrained decoding: what a text has to look like, as masks over the vocabulary.
//!
//! A [`Compiler`] belongs to one model: it knows the bytes of each token and which tokens end a text. It compiles a
//! [`Source`] — a JSON schema, a regular expression, an EBNF or Lark grammar, a list of choices, tool calls — to a
//! [`Grammar`], of which every text gets a [`Matcher`] of its own.
//!
//! Sources come from clients and are hostile until proven otherwise: they are bounded in bytes, depth and nodes before
//! the library sees them ([`Limits`]), the library has budgets of its own for compiling and for every mask, and a panic in
//! it is an error of that source alone. Compiling takes milliseconds to seconds and a deep stack, so it has a thread of
//! its own; call it where blocking is allowed. Nothing is written to disk.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod cache;
mod compiler;
mod ebnf;
mod error;
mod limits;
mod matcher;
mod source;
mod tools;
mod vocabulary;

pub use cache::CacheStats;
pub use compiler::Compiler;
pub use error::GrammarError;
pub use limits::Limits;
pub use matcher::{Grammar, Matcher};
pub use source::{Source, Whitespace};
pub use tools::{CallCount, Tool};
