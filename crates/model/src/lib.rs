//! What a Qwen2 is: `config.json` to [`ModelSpec`], exact arithmetic, rotation tables, the shard plan, and the forward pass.
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
pub mod roofline;
pub mod rope;
pub mod shard;
mod spec;
mod weight_format;

pub use error::{ModelError, Result};
pub use family::{Family, family, family_names};
pub use forward::Model;
pub use manifest::{Mlp, Role};
pub use positions::{LongContext, PositionProfile};
pub use shard::{RankShard, ShardOptions, ShardPlan};
pub use spec::{Architecture, DualChunkConfig, ModelSpec, MoeSpec, YarnConfig};
pub use weight_format::WeightFormat;
