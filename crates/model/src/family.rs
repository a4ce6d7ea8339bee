//! The five published members, by name: shapes without files, for the table, plans and dummy weights.

use longhaul_backend::DType;

use crate::spec::{Architecture, ModelSpec, MoeSpec};

/// A member of the Qwen2 family.
#[derive(Debug, Clone)]
pub struct Family {
    /// `qwen2-7b`
    pub name: &'static str,
    /// Hub id of the instruction-tuned checkpoint.
    pub hub_id: &'static str,
    /// Context the published model is said to serve, in tokens.
    pub published_context: usize,
    /// What its instruction-tuned `config.json` decides.
    pub spec: ModelSpec,
}

struct Shape {
    name: &'static str,
    hub_id: &'static str,
    context: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: (usize, usize),
    vocab: usize,
    tied: bool,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "qwen2-0.5b",
        hub_id: "Qwen/Qwen2-0.5B-Instruct",
        context: 32_768,
        hidden: 896,
        intermediate: 4864,
        layers: 24,
        heads: (14, 2),
        vocab: 151_936,
        tied: true,
    },
    Shape {
        name: "qwen2-1.5b",
        hub_id: "Qwen/Qwen2-1.5B-Instruct",
        context: 32_768,
        hidden: 1536,
        intermediate: 8960,
        layers: 28,
        heads: (12, 2),
        vocab: 151_936,
        tied: true,
    },
    Shape {
        name: "qwen2-7b",
        hub_id: "Qwen/Qwen2-7B-Instruct",
        context: 131_072,
        hidden: 3584,
        intermediate: 18_944,
        layers: 28,
        heads: (28, 4),
        vocab: 152_064,
        tied: false,
    },
    Shape {
        name: "qwen2-57b-a14b",
        hub_id: "Qwen/Qwen2-57B-A14B-Instruct",
        context: 65_536,
        hidden: 3584,
        intermediate: 18_944,
        layers: 28,
        heads: (28, 4),
        vocab: 151_936,
        tied: false,
    },
    Shape {
        name: "qwen2-72b",
        hub_id: "Qwen/Qwen2-72B-Instruct",
        context: 131_072,
        hidden: 8192,
        intermediate: 29_568,
        layers: 80,
        heads: (64, 8),
        vocab: 152_064,
        tied: false,
    },
];

/// Names that [`family`] knows, smallest first.
pub fn family_names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|s| s.name)
}

/// The family member called `name` (case is ignored).
pub fn family(name: &str) -> Option<Family> {
    let shape = SHAPES.iter().find(|s| s.name.eq_ignore_ascii_case(name))?;
    let moe = (shape.name == "qwen2-57b-a14b").then(|| MoeSpec {
        experts: 64,
        top_k: 8,
        intermediate_size: 2560,
        shared_intermediate_size: 20_480,
        norm_topk_prob: false,
        sparse_layers: vec![true; shape.layers],
    });
    let (query_heads, kv_heads) = shape.heads;
    let spec = ModelSpec {
        architecture: if moe.is_some() { Architecture::Moe } else { Architecture::Dense },
        vocab_size: shape.vocab,
        hidden_size: shape.hidden,
        intermediate_size: shape.intermediate,
        layers: shape.layers,
        query_heads,
        kv_heads,
        head_dim: shape.hidden / query_heads,
        qkv_bias: true,
        tied_embeddings: shape.tied,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 32_768,
        yarn: None,
        dual_chunk: None,
        sliding_window: None,
        moe,
        dtype: Some(DType::BF16),
        bos_token_id: Some(151_643),
        eos_token_ids: vec![151_645, 151_643],
    };
    Some(Family { name: shape.name, hub_id: shape.hub_id, published_context: shape.context, spec })
}
