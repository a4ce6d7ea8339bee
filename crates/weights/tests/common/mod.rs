//! What the integration tests share.

use std::path::Path;

use longhaul_testkit::TinyConfig;
use longhaul_weights::{Checkpoint, Result, TensorSpec};

/// The specs that a model of these sizes asks for.
pub fn specs(config: &TinyConfig) -> Vec<TensorSpec> {
    config.tensors().into_iter().map(|(name, shape)| TensorSpec::new(name, shape)).collect()
}

/// What a tied model tolerates in its checkpoint.
#[allow(dead_code)]
pub const OPTIONAL: [&str; 2] = ["lm_head.weight", "rotary_emb.inv_freq"];

/// Opens `dir` as a model of these sizes would.
#[allow(dead_code)]
pub fn open(dir: &Path, config: &TinyConfig) -> Result<Checkpoint> {
    Checkpoint::open(dir, &specs(config), &OPTIONAL)
}
