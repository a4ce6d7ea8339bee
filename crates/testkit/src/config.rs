//! Sizes of a tiny model, its config.json, and the names and shapes of its tensors.

use longhaul_backend::DType;
use serde_json::{Value, json};

use crate::tokenizer::{ENDOFTEXT, IM_END};

/// The sparse part of a mixture-of-experts model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyMoe {
    /// Routed experts in a layer.
    pub experts: usize,
    /// Routed experts a token uses.
    pub experts_per_token: usize,
    /// Width of a routed expert.
    pub intermediate_size: usize,
    /// Width of the shared expert.
    pub shared_intermediate_size: usize,
    /// Layers that have a dense MLP instead (`mlp_only_layers`).
    pub dense_layers: Vec<usize>,
}

/// Sizes of a tiny model; field names as in config.json.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct TinyConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub max_position_embeddings: usize,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub dtype: DType,
    /// `None` for `Qwen2ForCausalLM`, otherwise `Qwen2MoeForCausalLM`.
    pub moe: Option<TinyMoe>,
}

impl TinyConfig {
    /// Two layers, four query heads on two KV heads of 16, tied embeddings, bf16.
    pub fn dense() -> Self {
        Self {
            vocab_size: 320,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 4096,
            rope_theta: 1e6,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            dtype: DType::BF16,
            moe: None,
        }
    }

    /// As [`TinyConfig::dense`], with eight experts of which two are used, a shared expert, and an own lm_head.
    pub fn moe() -> Self {
        let moe = TinyMoe {
            experts: 8,
            experts_per_token: 2,
            intermediate_size: 24,
            shared_intermediate_size: 48,
            dense_layers: Vec::new(),
        };
        Self { tie_word_embeddings: false, moe: Some(moe), ..Self::dense() }
    }

    /// Width of an attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// The content of config.json, with the keys that published checkpoints have.
    pub fn to_json(&self) -> Value {
        let mut config = json!({
            "architectures": [if self.moe.is_some() { "Qwen2MoeForCausalLM" } else { "Qwen2ForCausalLM" }],
            "attention_dropout": 0.0,
            "bos_token_id": ENDOFTEXT,
            "eos_token_id": IM_END,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers,
            "model_type": if self.moe.is_some() { "qwen2_moe" } else { "qwen2" },
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "sliding_window": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype.to_string(),
            "transformers_version": "4.40.1",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        });
        if let (Some(moe), Some(object)) = (&self.moe, config.as_object_mut()) {
            let sparse = json!({
                "decoder_sparse_step": 1,
                "mlp_only_layers": moe.dense_layers,
                "moe_intermediate_size": moe.intermediate_size,
                "norm_topk_prob": false,
                "num_experts": moe.experts,
                "num_experts_per_tok": moe.experts_per_token,
                "output_router_logits": false,
                "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": moe.shared_intermediate_size,
            });
            object.extend(sparse.as_object().cloned().unwrap_or_default());
        }
        config
    }

    /// Names and shapes of all tensors in the published layout (`[out_features, in_features]`), in model order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab) = (self.hidden_size, self.vocab_size);
        let kv = self.num_key_value_heads * self.head_dim();
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: &[usize]| {
                out.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[hidden]);
            for (projection, rows) in [("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)] {
                add(&format!("self_attn.{projection}.weight"), &[rows, hidden]);
                add(&format!("self_attn.{projection}.bias"), &[rows]);
            }
            add("self_attn.o_proj.weight", &[hidden, hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            let mut mlp = |prefix: &str, width: usize| {
                add(&format!("{prefix}.gate_proj.weight"), &[width, hidden]);
                add(&format!("{prefix}.up_proj.weight"), &[width, hidden]);
                add(&format!("{prefix}.down_proj.weight"), &[hidden, width]);
            };
            match &self.moe {
                Some(moe) if !moe.dense_layers.contains(&layer) => {
                    for expert in 0..moe.experts {
                        mlp(&format!("mlp.experts.{expert}"), moe.intermediate_size);
                    }
                    mlp("mlp.shared_expert", moe.shared_intermediate_size);
                    add("mlp.gate.weight", &[moe.experts, hidden]);
                    add("mlp.shared_expert_gate.weight", &[1, hidden]);
                }
                _ => mlp("mlp", self.intermediate_size),
            }
        }
        out.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            out.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published sizes against published parameter and tensor counts of the released checkpoints.
    #[test]
    fn shapes_add_up_to_the_published_models() {
        let half_b = TinyConfig {
            vocab_size: 151_936,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            ..TinyConfig::dense()
        };
        let moe_57b = TinyConfig {
            vocab_size: 151_936,
            hidden_size: 3584,
            intermediate_size: 18_944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            moe: Some(TinyMoe {
                experts: 64,
                experts_per_token: 8,
                intermediate_size: 2560,
                shared_intermediate_size: 20_480,
                dense_layers: vec![],
            }),
            ..TinyConfig::moe()
        };
        for (config, tensors, parameters) in
            [(half_b, 290, 494_032_768usize), (moe_57b, 5771, 57_408_658_944)]
        {
            let list = config.tensors();
            assert_eq!(list.len(), tensors);
            assert_eq!(
                list.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>(),
                parameters
            );
        }
    }
}
