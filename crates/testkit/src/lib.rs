//! Tiny checkpoints, golden comparison and numeric assertions; for tests only.
//!
//! [`TinyCheckpoint`] writes a complete model directory in the published layout, with hooks to make any part of it
//! wrong. [`Golden`] reads the reference outputs kept in `tests/fixtures/goldens`. [`assert_close`] compares numbers and
//! says how far apart they are and where.
//!
//! Everything here panics on failure: its callers are tests.
#![forbid(unsafe_code)]

mod assert;
mod checkpoint;
mod config;
mod dummy_checkpoint;
mod fake_cuda;
mod golden;
mod safetensors_file;
mod tokenizer;

pub use assert::{assert_close, max_relative_to_max};
pub use checkpoint::{TinyCheckpoint, TinyModel};
pub use config::{TinyConfig, TinyMoe};
pub use dummy_checkpoint::write_dummy_checkpoint;
pub use fake_cuda::{FakeCuda, fake_cuda, with_fake_cuda};
pub use golden::{Golden, golden_cases, goldens_dir};
pub use safetensors_file::{TinyTensor, edit_header, encode_safetensors};
pub use tokenizer::{CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, tokenizer_config_json, tokenizer_json};
