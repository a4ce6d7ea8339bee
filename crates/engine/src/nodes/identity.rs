use longhaul_model::{ModelSpec, PositionProfile, ShardPlan};
use longhaul_nodes::{Identity, PROTOCOL};
use longhaul_weights::TensorSource;
use sha2::{Digest, Sha256};

/// Everything that shapes a step.
pub(crate) struct Plan<'a> {
    pub shards: &'a ShardPlan,
    pub positions: &'a PositionProfile,
    /// KV blocks of the pool.
    pub blocks: usize,
    /// Precision of products and of the cache, in words.
    pub precision: String,
}

/// What must be equal on all `nodes`. No weight is read: a checkpoint is known by its config and by names, types, shapes and
/// places of its tensors.
pub(crate) fn identity(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    tokenizer: &str,
    plan: &Plan<'_>,
    nodes: usize,
) -> Identity {
    let commit = option_env!("LONGHAUL_COMMIT").map(|commit| format!(" ({commit})")).unwrap_or_default();
    let model = format!("{spec:?}\n{}", source.inventory().join("\n"));
    let details = format!("{:?}\n{:?}\n{}", plan.shards, plan.positions, plan.precision);
    Identity {
        protocol: PROTOCOL,
        build: format!("{}{commit}", env!("CARGO_PKG_VERSION")),
        model: format!("{} layers, {}", spec.layers, sha256(model.as_bytes())),
        tokenizer: tokenizer.into(),
        plan: format!(
            "{} ranks, context {}, {} KV blocks, {}, {}",
            plan.shards.ranks().len(),
            plan.positions.max_model_len,
            plan.blocks,
            plan.precision,
            sha256(details.as_bytes())
        ),
        world_size: nodes,
    }
}

/// The first 16 bytes of the SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
