//! What a Qwen2 is: `config.json` to [`ModelSpec`], exact arithmetic, rotation tables, and the forward pass.
//!
//! The forward pass ([`Model::forward`]) is written once over [`longhaul_backend::Backend`] and reads like the paper.
//! Every checkpoint whose architecture is `Qwen2ForCausalLM` or `Qwen2MoeForCausalLM` runs; anything in a config that
//! would change the result and is not implemented is refused with the field's name, never ignored.
//!
//! Invariant: this crate names no device and opens no file; bytes come in, tensors come from a `TensorSource`.
#![forbid(unsafe_code)]

mod arithmetic;
mod config;
mod error;
mod family;
mod fields;
mod forward;
mod manifest;
mod positions;
pub mod rope;
mod spec;

pub use error::{ModelError, Result};
pub use family::{Family, family, family_names};
pub use forward::Model;
pub use positions::{LongContext, PositionProfile};
pub use spec::{Architecture, DualChunkConfig, ModelSpec, MoeSpec, YarnConfig};
