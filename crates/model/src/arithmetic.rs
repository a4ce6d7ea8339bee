//! Exact counts that follow from a config: parameters, bytes, KV cache, FLOPs.

use longhaul_backend::{DType, SequenceInputs};

use crate::ModelSpec;

impl ModelSpec {
    /// Weights and biases of one layer's attention and norms.
    fn attention_parameters(&self) -> u64 {
        let (hidden, q, kv) = (self.hidden_size as u64, self.query_size() as u64, self.kv_size() as u64);
        let biases = if self.qkv_bias { q + 2 * kv } else { 0 };
        hidden * (q + 2 * kv) + biases + q * hidden + 2 * hidden
    }

    /// Weights of one layer's MLP; with `active` only those that one token visits.
    fn mlp_parameters(&self, layer: usize, active: bool) -> u64 {
        let swiglu = |intermediate: usize| 3 * (self.hidden_size * intermediate) as u64;
        match &self.moe {
            Some(moe) if self.is_sparse(layer) => {
                let experts = if active { moe.top_k } else { moe.experts } as u64;
                let router = (moe.experts * self.hidden_size) as u64;
                let shared_gate = if moe.shared_intermediate_size > 0 { self.hidden_size as u64 } else { 0 };
                router
                    + experts * swiglu(moe.intermediate_size)
                    + swiglu(moe.shared_intermediate_size)
                    + shared_gate
            }
            _ => swiglu(self.intermediate_size),
        }
    }

    fn body_parameters(&self, active: bool) -> u64 {
        let layers: u64 =
            (0..self.layers).map(|l| self.attention_parameters() + self.mlp_parameters(l, active)).sum();
        layers + self.hidden_size as u64
    }

    /// Weights of the embedding, and of the output head where it is a matrix of its own.
    pub fn embedding_parameters(&self) -> u64 {
        let table = (self.vocab_size * self.hidden_size) as u64;
        if self.tied_embeddings { table } else { 2 * table }
    }

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        self.body_parameters(false) + self.embedding_parameters()
    }

    /// Parameters without embedding and output head.
    pub fn non_embedding_parameters(&self) -> u64 {
        self.body_parameters(false)
    }

    /// Parameters that one token visits (embedding and head included); all of them in a dense model.
    pub fn active_parameters(&self) -> u64 {
        self.body_parameters(true) + self.embedding_parameters()
    }

    /// Bytes of the weights stored as `dtype`.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        self.parameters() * dtype.size() as u64
    }

    /// Bytes of K and V that one token leaves in the cache, over all layers.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> u64 {
        (2 * self.layers * self.kv_size() * dtype.size()) as u64
    }

    /// Bytes read from memory to decode one token at batch 1 and `context` tokens: active weights (one row of the
    /// embedding), and the cache.
    pub fn decode_bytes(&self, context: usize, weights: DType, kv: DType) -> u64 {
        let head = (self.vocab_size * self.hidden_size) as u64;
        (self.body_parameters(true) + head) * weights.size() as u64
            + self.kv_bytes_per_token(kv) * context as u64
    }

    /// Floating-point operations of one token at position `context`: two per active weight of a matrix product, and
    /// `4 · head_dim · query_heads` per key and layer. The output head counts when `with_logits`.
    pub fn flops_per_token(&self, context: usize, with_logits: bool) -> u64 {
        let norms = (2 * self.layers + 1) * self.hidden_size;
        let biases = if self.qkv_bias { self.layers * (self.query_size() + 2 * self.kv_size()) } else { 0 };
        let matrices = self.body_parameters(true) - (norms + biases) as u64;
        let head = if with_logits { (self.vocab_size * self.hidden_size) as u64 } else { 0 };
        2 * (matrices + head) + 4 * (self.layers * self.query_size()) as u64 * context as u64
    }

    /// Floating-point operations of a step over `sequences`, as if each row had its sequence's whole context and wanted logits:
    /// an upper bound by which steps are told apart.
    pub fn step_flops(&self, sequences: &[SequenceInputs]) -> u64 {
        let of = |s: &SequenceInputs| self.flops_per_token(s.kv_len, true).saturating_mul(s.rows as u64);
        sequences.iter().map(of).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use longhaul_backend::DType;

    use crate::family;

    /// Counts of the published checkpoints (tensor lists of the released files).
    #[test]
    fn the_family_adds_up() {
        let expected: [(&str, u64, u64, u64); 5] = [
            ("qwen2-0.5b", 494_032_768, 357_898_112, 12_288),
            ("qwen2-1.5b", 1_543_714_304, 1_310_340_608, 28_672),
            ("qwen2-7b", 7_615_616_512, 6_525_621_760, 57_344),
            ("qwen2-57b-a14b", 57_408_658_944, 56_319_581_696, 57_344),
            ("qwen2-72b", 72_706_203_648, 70_214_787_072, 327_680),
        ];
        for (name, parameters, non_embedding, kv_bytes) in expected {
            let spec = family(name).unwrap().spec;
            assert_eq!(spec.parameters(), parameters, "{name}");
            assert_eq!(spec.non_embedding_parameters(), non_embedding, "{name}");
            assert_eq!(spec.kv_bytes_per_token(DType::BF16), kv_bytes, "{name}");
            assert_eq!(spec.weight_bytes(DType::BF16), 2 * parameters, "{name}");
            let listed: u64 = spec.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
            assert_eq!(listed, parameters, "{name}: the tensor list and the formula differ");
        }
    }

    #[test]
    fn tensor_counts_match_the_released_indices() {
        let counts = [
            ("qwen2-0.5b", 290),
            ("qwen2-1.5b", 338),
            ("qwen2-7b", 339),
            ("qwen2-57b-a14b", 5771),
            ("qwen2-72b", 963),
        ];
        for (name, count) in counts {
            assert_eq!(family(name).unwrap().spec.tensors().len(), count, "{name}");
        }
    }

    #[test]
    fn the_mixture_of_experts_activates_fourteen_billion() {
        let spec = family("qwen2-57b-a14b").unwrap().spec;
        // 56 of 64 experts of 3 · 3584 · 2560 weights stay idle in each of 28 layers; embedding and head have 0.545 B each.
        assert_eq!(spec.active_parameters(), 14_249_270_784);
        assert_eq!(spec.active_parameters() - spec.embedding_parameters(), 13_160_193_536);
        let dense = family("qwen2-7b").unwrap().spec;
        assert_eq!(dense.active_parameters(), dense.parameters());
    }

    #[test]
    fn flops_count_two_per_weight_and_the_attention() {
        let spec = family("qwen2-0.5b").unwrap().spec;
        // 24 layers: q 896·896, k and v 128·896 each, o 896·896, three MLP matrices 896·4864.
        let matrices = 24 * (896 * 896 * 2 + 2 * 128 * 896 + 3 * 896 * 4864u64);
        assert_eq!(spec.flops_per_token(0, false), 2 * matrices);
        assert_eq!(spec.flops_per_token(0, true), 2 * (matrices + 151_936 * 896));
        assert_eq!(spec.flops_per_token(100, false) - 2 * matrices, 4 * 24 * 14 * 64 * 100);
    }
}
