//! The tensors of a checkpoint by name and shape (Hugging Face layout, `[out, in]`).

use longhaul_weights::TensorSpec;

use crate::ModelSpec;

impl ModelSpec {
    /// Every tensor the model needs. A tied output head is not among them.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (hidden, q, kv) = (self.hidden_size, self.query_size(), self.kv_size());
        let mut list = Vec::new();
        let mut push = |name: String, shape: &[usize]| list.push(TensorSpec { name, shape: shape.to_vec() });
        push("model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..self.layers {
            let name = |suffix: &str| layer_tensor(layer, suffix);
            push(name("input_layernorm.weight"), &[hidden]);
            for (projection, rows) in [("q", q), ("k", kv), ("v", kv)] {
                push(name(&format!("self_attn.{projection}_proj.weight")), &[rows, hidden]);
                if self.qkv_bias {
                    push(name(&format!("self_attn.{projection}_proj.bias")), &[rows]);
                }
            }
            push(name("self_attn.o_proj.weight"), &[hidden, q]);
            push(name("post_attention_layernorm.weight"), &[hidden]);
            let mut swiglu = |prefix: &str, intermediate: usize| {
                push(name(&format!("{prefix}.gate_proj.weight")), &[intermediate, hidden]);
                push(name(&format!("{prefix}.up_proj.weight")), &[intermediate, hidden]);
                push(name(&format!("{prefix}.down_proj.weight")), &[hidden, intermediate]);
            };
            match &self.moe {
                Some(moe) if self.is_sparse(layer) => {
                    for expert in 0..moe.experts {
                        swiglu(&format!("mlp.experts.{expert}"), moe.intermediate_size);
                    }
                    if moe.shared_intermediate_size > 0 {
                        swiglu("mlp.shared_expert", moe.shared_intermediate_size);
                        push(name("mlp.shared_expert_gate.weight"), &[1, hidden]);
                    }
                    push(name("mlp.gate.weight"), &[moe.experts, hidden]);
                }
                _ => swiglu("mlp", self.intermediate_size),
            }
        }
        push("model.norm.weight".into(), &[hidden]);
        if !self.tied_embeddings {
            push("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        list
    }

    /// Tensors that a checkpoint may hold although the model does not read them.
    pub fn ignorable_tensors(&self) -> Vec<&'static str> {
        let mut names = vec!["rotary_emb.inv_freq"];
        if self.tied_embeddings {
            names.push("lm_head.weight");
        }
        names
    }
}

/// `model.layers.{layer}.{suffix}`
pub(crate) fn layer_tensor(layer: usize, suffix: &str) -> String {
    format!("model.layers.{layer}.{suffix}")
}
