//! How long a step takes at best: bytes over bandwidth or operations over throughput, whichever is more, plus what the
//! collectives cost. A limit, not a forecast.
//!
//! A step's ranks meet at every all-reduce, so the slowest rank counts in every part.

use crate::shard::{RankShard, ShardPlan};
use crate::{Mlp, ModelSpec, Role, WeightFormat};

/// What one GPU reaches, and what an all-reduce among several costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Bytes a second from device memory.
    pub bandwidth: f64,
    /// Floating-point operations a second in bfloat16.
    pub flops: f64,
    /// Floating-point operations a second in fp8.
    pub fp8_flops: f64,
    /// What an all-reduce costs.
    pub link: Link,
}

impl Default for Roofline {
    /// One H200: 4.3 TB/s is what a copy reaches and 790 TFLOP/s what a bfloat16 product reaches at its power limit;
    /// 1500 TFLOP/s in fp8 is DeepGEMM's public figure for an H800, less a little.
    fn default() -> Self {
        Self { bandwidth: 4.3e12, flops: 790e12, fp8_flops: 1500e12, link: Link::NvLink }
    }
}

/// What an all-reduce costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Link {
    /// GPUs of one node on NVLink, by public measurements on H100 (vLLM #24111, #24532, #42324; SGLang #2904): 4.0, 5.0 and
    /// 7.0 µs over 2, 4 and 8 GPUs for small messages and 3.8, 4.6 and 4.6 ps a byte for large ones. Sizes in between are
    /// interpolated; beyond 8 the latency goes on along its last slope, which nobody has measured.
    NvLink,
    /// Any other: `latency + 2 (n − 1) / n · bytes / bandwidth`.
    Given {
        /// Seconds of an all-reduce of a few bytes.
        latency: f64,
        /// Bytes a second that a GPU sends to the others.
        bandwidth: f64,
    },
}

impl Link {
    /// Seconds of one all-reduce of `bytes` over `ranks`; 0 on one.
    pub fn all_reduce(self, ranks: usize, bytes: f64) -> f64 {
        /// GPUs, seconds, seconds a byte.
        const MEASURED: [(f64, f64, f64); 3] =
            [(2.0, 4.0e-6, 3.8e-12), (4.0, 5.0e-6, 4.6e-12), (8.0, 7.0e-6, 4.6e-12)];
        if ranks < 2 {
            return 0.0;
        }
        let n = ranks as f64;
        match self {
            Link::NvLink => {
                let [two, four, eight] = MEASURED;
                let (a, b) = if n <= four.0 { (two, four) } else { (four, eight) };
                let t = (n - a.0) / (b.0 - a.0);
                (a.1 + t * (b.1 - a.1)) + (a.2 + t * (b.2 - a.2)) * bytes
            }
            Link::Given { latency, bandwidth } => latency + 2.0 * (n - 1.0) / n * bytes / bandwidth,
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// One token for each of `batch` sequences with `context` cached tokens each.
    Decode {
        /// Sequences.
        batch: usize,
        /// Cached tokens of each.
        context: usize,
    },
    /// A whole prompt, of whose last token the logits are wanted.
    Prefill {
        /// Tokens.
        tokens: usize,
    },
}

impl Work {
    /// Rows of the step.
    pub fn rows(self) -> usize {
        match self {
            Work::Decode { batch, .. } => batch,
            Work::Prefill { tokens } => tokens,
        }
    }

    /// Tokens that a step brings forward.
    fn logit_rows(self) -> usize {
        match self {
            Work::Decode { batch, .. } => batch,
            Work::Prefill { .. } => 1,
        }
    }

    /// Keys that all rows together attend to.
    fn keys(self) -> f64 {
        match self {
            Work::Decode { batch, context } => batch as f64 * context as f64,
            Work::Prefill { tokens } => tokens as f64 * tokens as f64 / 2.0,
        }
    }

    /// Cached tokens that are read from memory. A prompt's own keys are read far less often than they are used.
    fn cached(self) -> f64 {
        match self {
            Work::Decode { batch, context } => batch as f64 * context as f64,
            Work::Prefill { .. } => 0.0,
        }
    }
}

/// Seconds of a step, by what takes them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Weights and matrix products.
    pub linear: f64,
    /// Cached keys and values, and attention.
    pub attention: f64,
    /// All-reduces.
    pub all_reduce: f64,
}

impl StepTime {
    /// All of it; nothing overlaps.
    pub fn total(&self) -> f64 {
        self.linear + self.attention + self.all_reduce
    }
}

/// All-reduces of a step on more than one rank: one after the embedding, two a layer.
pub fn all_reduces(spec: &ModelSpec, ranks: usize) -> usize {
    if ranks > 1 { 2 * spec.layers + 1 } else { 0 }
}

/// Bytes of one all-reduce of a step of `rows` rows: the residual stream in bfloat16.
pub fn all_reduce_bytes(spec: &ModelSpec, rows: usize) -> u64 {
    2 * (rows * spec.hidden_size) as u64
}

/// Bytes of K and V of one token that `shard` holds, at `element_bytes` an element.
pub fn kv_bytes_per_token(spec: &ModelSpec, shard: &RankShard, element_bytes: usize) -> u64 {
    2 * (spec.layers * shard.kv_heads.len() * spec.head_dim * element_bytes) as u64
}

/// Distinct experts that `rows` tokens visit, if every expert is as likely as any other.
fn distinct_experts(experts: usize, top_k: usize, rows: usize) -> f64 {
    let (experts, top_k) = (experts as f64, top_k as f64);
    experts * (1.0 - (1.0 - top_k / experts).powf(rows as f64))
}

impl Roofline {
    /// The least time of `work` by `plan`, with weights stored as `format` and a cache of `kv_bytes` an element.
    pub fn step(
        &self,
        spec: &ModelSpec,
        plan: &ShardPlan,
        work: Work,
        format: WeightFormat,
        kv_bytes: usize,
    ) -> StepTime {
        let slowest =
            |seconds: &dyn Fn(&RankShard) -> f64| plan.ranks().iter().map(seconds).fold(0.0, f64::max);
        let ranks = plan.ranks().len();
        let bytes = all_reduce_bytes(spec, work.rows()) as f64;
        StepTime {
            linear: slowest(&|shard| self.linear(spec, plan, shard, work, format)),
            attention: slowest(&|shard| self.attention(spec, shard, work, kv_bytes)),
            all_reduce: all_reduces(spec, ranks) as f64 * self.link.all_reduce(ranks, bytes),
        }
    }

    fn linear(
        &self,
        spec: &ModelSpec,
        plan: &ShardPlan,
        shard: &RankShard,
        work: Work,
        format: WeightFormat,
    ) -> f64 {
        let rows = work.rows() as f64;
        let (visited, distinct) = match &spec.moe {
            Some(moe) => {
                let experts = moe.experts as f64;
                let distinct = distinct_experts(moe.experts, moe.top_k, work.rows());
                (moe.top_k as f64 / experts, distinct / experts)
            }
            None => (0.0, 0.0),
        };
        let is_expert = |role| matches!(role, Role::Up(Mlp::Expert(_)) | Role::Down(Mlp::Expert(_)));
        let is_head = |role| role == Role::Head || role == Role::Embedding && spec.tied_embeddings;
        let bytes: f64 = plan.sum(shard, |role, rows, cols| {
            let bytes = format.bytes(role, &rows, &cols) as f64;
            match role {
                // Of the embedding only the rows of the step's ids are read.
                Role::Embedding if !spec.tied_embeddings => 0.0,
                role if is_expert(role) => bytes * distinct,
                _ => bytes,
            }
        });
        let products = |head: bool| -> f64 {
            plan.sum(shard, |role, rows, cols| {
                let is_product = cols.end > 1 && (role != Role::Embedding || is_head(role));
                if !is_product || is_head(role) != head {
                    return 0.0;
                }
                let share = if is_expert(role) { visited } else { 1.0 };
                2.0 * rows.len() as f64 * cols.len() as f64 * share
            })
        };
        let flops = if format == WeightFormat::Fp8 { self.fp8_flops } else { self.flops };
        let operations =
            rows * products(false) / flops + work.logit_rows() as f64 * products(true) / self.flops;
        operations.max(bytes / self.bandwidth)
    }

    fn attention(&self, spec: &ModelSpec, shard: &RankShard, work: Work, kv_bytes: usize) -> f64 {
        let operations = 4.0 * (spec.layers * shard.query_heads.len() * spec.head_dim) as f64 * work.keys();
        let flops = match work {
            // Quantised keys and values meet fp8 products while decoding; a prompt's are bfloat16.
            Work::Decode { .. } if kv_bytes == 1 => self.fp8_flops,
            _ => self.flops,
        };
        let bytes = kv_bytes_per_token(spec, shard, kv_bytes) as f64 * work.cached();
        (operations / flops).max(bytes / self.bandwidth)
    }
}

#[cfg(test)]
mod tests {
    use longhaul_backend::DType;

    use super::*;
    use crate::{ShardOptions, family};

    const BF16: WeightFormat = WeightFormat::Float(DType::BF16);

    fn tokens_per_second(name: &str, ranks: usize, work: Work, format: WeightFormat, kv: usize) -> f64 {
        let spec = family(name).unwrap().spec;
        let plan = ShardPlan::new(&spec, ranks, &ShardOptions::default()).unwrap();
        work.rows() as f64 / Roofline::default().step(&spec, &plan, work, format, kv).total()
    }

    /// Cells of an independent model of the same physics (a table by model, batch, context and ranks, computed from the
    /// shapes by another program): `(model, ranks, format, KV bytes, batch, context, tokens a second)`.
    #[test]
    fn decode_matches_an_independent_table() {
        use WeightFormat::{Fp8, Int4};
        let cells = [
            ("qwen2-0.5b", 1, BF16, 2, 1, 2048, 4243.8_f64),
            ("qwen2-0.5b", 1, Fp8, 1, 1, 2048, 6688.6),
            ("qwen2-0.5b", 1, Int4, 1, 1, 2048, 9159.5),
            ("qwen2-1.5b", 1, BF16, 2, 32, 32768, 4151.0),
            ("qwen2-7b", 1, BF16, 2, 1, 2048, 301.6),
            ("qwen2-7b", 1, Fp8, 1, 1, 2048, 560.2),
            ("qwen2-7b", 1, BF16, 2, 1, 131_072, 199.0),
            ("qwen2-7b", 1, BF16, 2, 128, 2048, 18866.0),
            ("qwen2-7b", 1, Int4, 1, 128, 2048, 31690.0),
            ("qwen2-57b-a14b", 1, BF16, 2, 1, 2048, 156.2),
            ("qwen2-57b-a14b", 1, BF16, 2, 32, 2048, 1185.0),
            ("qwen2-57b-a14b", 1, Fp8, 1, 128, 2048, 8475.0),
            ("qwen2-72b", 1, Int4, 1, 1, 2048, 110.2),
            ("qwen2-7b", 2, BF16, 2, 1, 2048, 530.9),
            ("qwen2-7b", 4, BF16, 2, 1, 2048, 900.2),
            ("qwen2-72b", 2, BF16, 2, 1, 2048, 57.6),
            ("qwen2-72b", 4, Fp8, 1, 1, 2048, 197.6),
            ("qwen2-72b", 8, BF16, 2, 1, 2048, 188.5),
            ("qwen2-72b", 8, BF16, 2, 128, 2048, 13741.0),
        ];
        for (name, ranks, format, kv, batch, context, expected) in cells {
            let found = tokens_per_second(name, ranks, Work::Decode { batch, context }, format, kv);
            // Half a unit of the last digit printed, and: the table counts biases among the quantised weights, and on
            // several ranks it leaves out the all-reduce after the embedding and deals the norms out.
            let rounding = if f64::fract(expected) == 0.0 { 0.5 } else { 0.05 };
            let tolerance = if ranks == 1 { 5e-4 } else { 5e-3 };
            let error = (found - expected).abs();
            assert!(
                error < tolerance * expected + rounding,
                "{name} x{ranks} {format} B{batch}@{context}: {found}, {expected}"
            );
        }
    }

    #[test]
    fn prefill_matches_the_same_table() {
        let cells = [
            ("qwen2-0.5b", BF16, 2048, 982.7e3),
            ("qwen2-7b", BF16, 2048, 58.7e3),
            ("qwen2-7b", BF16, 131_072, 20.1e3),
            ("qwen2-7b", WeightFormat::Fp8, 32768, 58.7e3),
            ("qwen2-57b-a14b", BF16, 32768, 24.0e3),
            ("qwen2-72b", BF16, 32768, 4.3e3),
        ];
        for (name, format, tokens, expected) in cells {
            let found = tokens_per_second(name, 1, Work::Prefill { tokens }, format, 2);
            assert!(
                (found - expected).abs() < 0.055e3 + 1e-3 * expected,
                "{name} {format} {tokens}: {found}"
            );
        }
    }

    #[test]
    fn more_ranks_cost_more_to_join() {
        let link = Link::NvLink;
        assert_eq!(link.all_reduce(1, 1e6), 0.0);
        let small: Vec<f64> = (2..=16).map(|n| link.all_reduce(n, 0.0) * 1e6).collect();
        assert!(small.is_sorted());
        assert!([(0, 4.0), (2, 5.0), (6, 7.0), (14, 11.0)].iter().all(|&(i, t)| (small[i] - t).abs() < 1e-9));
        let given = Link::Given { latency: 1e-6, bandwidth: 1e9 };
        assert!((given.all_reduce(4, 1e6) - (1e-6 + 1.5e-3)).abs() < 1e-12);
    }

    #[test]
    fn a_rank_without_heads_reads_no_cache() {
        let spec = family("qwen2-0.5b").unwrap().spec;
        let plan = ShardPlan::new(&spec, 16, &ShardOptions::default()).unwrap();
        let per_token: Vec<u64> = plan.ranks().iter().map(|s| kv_bytes_per_token(&spec, s, 2)).collect();
        assert_eq!(per_token[..14], [24 * 2 * 64 * 2; 14]);
        assert_eq!(per_token[14..], [0, 0]);
    }
}
