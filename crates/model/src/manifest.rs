//! The tensors of a checkpoint by name and shape (Hugging Face layout, `[out, in]`).

use longhaul_weights::TensorSpec;

use crate::ModelSpec;

/// What a tensor is to the model. It decides how a tensor-parallel shard cuts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// `[vocab, hidden]`: a row a token id.
    Embedding,
    /// `[vocab, hidden]`: the output head that is a matrix of its own.
    Head,
    /// Norms, the router, the gate of the shared expert.
    Replicated,
    /// Weight or bias of the query projection: rows are query heads.
    Query,
    /// Weight or bias of the key or value projection: rows are KV heads.
    KeyValue,
    /// `[hidden, query]`: columns are query heads.
    Output,
    /// Gate or up projection of an MLP: rows are its columns.
    Up(Mlp),
    /// Down projection of an MLP.
    Down(Mlp),
}

/// Which MLP of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mlp {
    /// The MLP of a dense layer.
    Dense,
    /// The expert that every token visits.
    Shared,
    /// A routed expert.
    Expert(usize),
}

impl Role {
    /// Whether quantised checkpoints quantise this tensor, if it is a matrix: embedding, head, router and norms never are.
    pub fn is_quantisable(self) -> bool {
        !matches!(self, Role::Embedding | Role::Head | Role::Replicated)
    }
}

impl ModelSpec {
    /// Every tensor the model needs. A tied output head is not among them.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.manifest().into_iter().map(|(tensor, _)| tensor).collect()
    }

    /// [`ModelSpec::tensors`], each with its role.
    pub fn manifest(&self) -> Vec<(TensorSpec, Role)> {
        let (hidden, q, kv) = (self.hidden_size, self.query_size(), self.kv_size());
        let mut list = Vec::new();
        let mut push = |role: Role, name: String, shape: &[usize]| {
            list.push((TensorSpec { name, shape: shape.to_vec() }, role));
        };
        push(Role::Embedding, "model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..self.layers {
            let name = |suffix: &str| layer_tensor(layer, suffix);
            push(Role::Replicated, name("input_layernorm.weight"), &[hidden]);
            for (role, projection, rows) in
                [(Role::Query, "q", q), (Role::KeyValue, "k", kv), (Role::KeyValue, "v", kv)]
            {
                push(role, name(&format!("self_attn.{projection}_proj.weight")), &[rows, hidden]);
                if self.qkv_bias {
                    push(role, name(&format!("self_attn.{projection}_proj.bias")), &[rows]);
                }
            }
            push(Role::Output, name("self_attn.o_proj.weight"), &[hidden, q]);
            push(Role::Replicated, name("post_attention_layernorm.weight"), &[hidden]);
            let mut swiglu = |mlp: Mlp, prefix: &str, intermediate: usize| {
                for projection in ["gate", "up"] {
                    let name = name(&format!("{prefix}.{projection}_proj.weight"));
                    push(Role::Up(mlp), name, &[intermediate, hidden]);
                }
                push(Role::Down(mlp), name(&format!("{prefix}.down_proj.weight")), &[hidden, intermediate]);
            };
            match &self.moe {
                Some(moe) if self.is_sparse(layer) => {
                    for expert in 0..moe.experts {
                        let prefix = format!("mlp.experts.{expert}");
                        swiglu(Mlp::Expert(expert), &prefix, moe.intermediate_size);
                    }
                    if moe.shared_intermediate_size > 0 {
                        swiglu(Mlp::Shared, "mlp.shared_expert", moe.shared_intermediate_size);
                        push(Role::Replicated, name("mlp.shared_expert_gate.weight"), &[1, hidden]);
                    }
                    push(Role::Replicated, name("mlp.gate.weight"), &[moe.experts, hidden]);
                }
                _ => swiglu(Mlp::Dense, "mlp", self.intermediate_size),
            }
        }
        push(Role::Replicated, "model.norm.weight".into(), &[hidden]);
        if !self.tied_embeddings {
            push(Role::Head, "lm_head.weight".into(), &[self.vocab_size, hidden]);
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
