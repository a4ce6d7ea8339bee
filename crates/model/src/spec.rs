use longhaul_backend::DType;

/// The two architectures of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `Qwen2ForCausalLM`
    Dense,
    /// `Qwen2MoeForCausalLM`
    Moe,
}

impl Architecture {
    /// The name in `architectures`.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Dense => "Qwen2ForCausalLM",
            Architecture::Moe => "Qwen2MoeForCausalLM",
        }
    }

    /// The name in `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Architecture::Dense => "qwen2",
            Architecture::Moe => "qwen2_moe",
        }
    }
}

/// `rope_scaling` of type `yarn` (arXiv 2309.00071, as transformers computes it).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnConfig {
    /// Context extension `s`.
    pub factor: f64,
    /// Context the model was trained on, `O`.
    pub original_max_position_embeddings: usize,
    /// Rotations above which frequencies are left alone; 32 by default.
    pub beta_fast: f64,
    /// Rotations below which frequencies are divided by `factor`; 1 by default.
    pub beta_slow: f64,
    /// Whether the correction range is rounded to whole dimensions; true by default.
    pub truncate: bool,
    /// `a`: factor on cos and sin, so logits are multiplied by `a²`.
    pub attention_factor: f64,
}

/// `dual_chunk_attention_config` (Qwen2.5-1M technical report §5.1; `docs/architecture.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DualChunkConfig {
    /// `C`: largest rotated query position.
    pub chunk_size: usize,
    /// `w`: rows of a chunk that see the previous one at true distance.
    pub local_size: usize,
    /// Where the logarithmic length scale starts; `None` = no scale.
    pub original_max_position_embeddings: Option<usize>,
}

/// The mixture-of-experts part of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeSpec {
    /// Routed experts of a sparse layer.
    pub experts: usize,
    /// Experts a token visits.
    pub top_k: usize,
    /// Rows of an expert's gate and up projections.
    pub intermediate_size: usize,
    /// Rows of the shared expert's; 0 = no shared expert.
    pub shared_intermediate_size: usize,
    /// Whether the chosen router weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// For each layer, whether it is sparse (`decoder_sparse_step`, `mlp_only_layers`).
    pub sparse_layers: Vec<bool>,
}

/// Everything about a model that its config decides.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Dense or mixture of experts.
    pub architecture: Architecture,
    /// Rows of the embedding (padded beyond the tokenizer's vocabulary).
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the dense MLP's gate and up projections.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads; a divisor of `query_heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotation frequencies.
    pub rope_theta: f64,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// YaRN, when the checkpoint asks for it.
    pub yarn: Option<YarnConfig>,
    /// Dual Chunk Attention, when the checkpoint asks for it.
    pub dual_chunk: Option<DualChunkConfig>,
    /// A sliding window that some layer uses: contexts up to it are exact, longer ones are refused.
    pub sliding_window: Option<usize>,
    /// Mixture of experts.
    pub moe: Option<MoeSpec>,
    /// `torch_dtype`/`dtype`, if given.
    pub dtype: Option<DType>,
    /// `bos_token_id`.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<u32>,
}

impl ModelSpec {
    /// Whether `layer` has experts instead of a dense MLP.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|m| m.sparse_layers.get(layer).copied().unwrap_or(false))
    }

    /// Columns of the query projection.
    pub fn query_size(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Columns of the key projection, and of the value projection.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Tokens of context the weights were trained on: what the config says under Dual Chunk Attention or YaRN,
    /// otherwise `max_position_embeddings`.
    pub fn trained_window(&self) -> usize {
        if let Some(dual_chunk) = self.dual_chunk {
            dual_chunk.original_max_position_embeddings.unwrap_or(dual_chunk.chunk_size)
        } else if let Some(yarn) = self.yarn {
            yarn.original_max_position_embeddings
        } else {
            self.max_position_embeddings
        }
    }
}
