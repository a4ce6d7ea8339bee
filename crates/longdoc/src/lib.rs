//! Questions over long documents ([`ask()`]) and needle in a haystack ([`needle::run`]).
//!
//! Both work on anything that implements [`longhaul_engine::Generate`]; neither knows a device, a terminal or a command
//! line. Progress leaves through [`longhaul_engine::Observer`] and [`needle::NeedleObserver`], results as values that
//! serialize to JSON, pictures through [`render`].
#![forbid(unsafe_code)]

pub mod ask;
mod document;
mod error;
pub mod needle;
mod pdf;
pub mod render;
mod sentences;
#[cfg(test)]
mod testing;
mod words;

pub use ask::{Answer, AskOptions, Passage, ask};
pub use document::{Document, MAX_FILE_BYTES, MAX_TEXT_BYTES};
pub use error::{DocumentTokens, LongdocError, Result};
