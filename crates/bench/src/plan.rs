//! What a model needs on a number of GPUs: shards, memory, KV capacity, collectives, and the speed that physics allows.

use std::ops::Range;

use longhaul_model::roofline::{Roofline, Work, all_reduce_bytes, all_reduces, kv_bytes_per_token};
use longhaul_model::{ModelSpec, RankShard, Result, ShardOptions, ShardPlan, WeightFormat};
use serde::Serialize;

/// The formats that every plan is checked for.
pub const FORMATS: [WeightFormat; 3] =
    [WeightFormat::Float(longhaul_backend::DType::BF16), WeightFormat::Fp8, WeightFormat::Int4];

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct PlanConfig {
    /// How the weights are stored.
    pub format: WeightFormat,
    /// Bytes of an element of the KV cache.
    pub kv_element_bytes: usize,
    /// Deal experts whole.
    pub expert_parallel: bool,
    /// Bytes of one GPU that weights and KV cache may take.
    pub usable_memory: u64,
    /// Tokens of context that are asked for.
    pub max_model_len: usize,
    /// Sequences that decode together.
    pub batch: usize,
    /// Cached tokens of each of them.
    pub context: usize,
    /// Tokens of a prompt chunk.
    pub chunk: usize,
    /// What a GPU reaches.
    pub roofline: Roofline,
}

/// One rank of a plan.
#[derive(Debug, Clone, Serialize)]
pub struct RankReport {
    /// The rank.
    pub rank: usize,
    /// Query heads of the model.
    pub query_heads: Range<usize>,
    /// KV heads of the model; other ranks may hold some of them, too.
    pub kv_heads: Range<usize>,
    /// Columns of the dense MLP.
    pub columns: Range<usize>,
    /// Columns of the shared expert.
    pub shared_columns: Range<usize>,
    /// Routed experts.
    pub experts: Range<usize>,
    /// Columns of each routed expert.
    pub expert_columns: Range<usize>,
    /// Rows of embedding and output head.
    pub vocabulary: Range<usize>,
    /// Parameters held, replicated ones included.
    pub parameters: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of K and V a token.
    pub kv_bytes_per_token: u64,
    /// Tokens of KV cache beside the weights; `None` on a rank that holds none.
    pub kv_tokens: Option<u64>,
}

/// Whether a plan fits with its weights in one format.
#[derive(Debug, Clone, Serialize)]
pub struct FormatReport {
    /// The format.
    pub dtype: String,
    /// Bytes of the weights on the fullest rank.
    pub weight_bytes: u64,
    /// Whether the weights and at least one token of context fit.
    pub fits: bool,
    /// Tokens of KV cache that fit, all sequences together.
    pub kv_tokens: u64,
    /// The longest sequence: what fits, up to the context asked for.
    pub context: u64,
}

/// A plan over one number of GPUs.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport {
    /// GPUs.
    pub gpus: usize,
    /// Every rank.
    pub ranks: Vec<RankReport>,
    /// Parameters of the model: what the ranks hold together less what is replicated.
    pub parameters: u64,
    /// Parameters held by more than one rank, once for every rank after the first.
    pub replicated_parameters: u64,
    /// Largest share of the weights over the mean.
    pub imbalance: f64,
    /// Largest share of the query heads over the mean.
    pub head_imbalance: f64,
    /// Whether and with how much context it fits, by format.
    pub formats: Vec<FormatReport>,
    /// All-reduces of a step.
    pub all_reduces: usize,
    /// Bytes that a decode step hands to its all-reduces, on each rank.
    pub decode_all_reduce_bytes: u64,
    /// Bytes that a prompt chunk hands to its all-reduces, on each rank.
    pub prefill_all_reduce_bytes: u64,
    /// Tokens a second of all sequences at best, decoding.
    pub decode_tokens_per_second: f64,
    /// Tokens a second at best, reading a prompt of one chunk.
    pub prefill_tokens_per_second: f64,
}

/// The plan of `spec` over `gpus` GPUs.
///
/// # Errors
/// A number of GPUs or options that the model cannot be dealt by.
pub fn plan(spec: &ModelSpec, gpus: usize, config: &PlanConfig) -> Result<PlanReport> {
    let plan = shards(spec, gpus, config, config.format)?;
    let decode = Work::Decode { batch: config.batch, context: config.context };
    let prefill = Work::Prefill { tokens: config.chunk };
    let speed = |work: Work| {
        let time = config.roofline.step(spec, &plan, work, config.format, config.kv_element_bytes);
        work.rows() as f64 / time.total()
    };
    let all_reduces = all_reduces(spec, gpus);
    let exchanged = |rows| all_reduces as u64 * all_reduce_bytes(spec, rows);
    let formats = FORMATS.into_iter().map(|format| {
        let plan = shards(spec, gpus, config, format)?;
        Ok(fit(spec, &plan, config, format))
    });
    let most_heads = plan.ranks().iter().map(|s| s.query_heads.len()).max().unwrap_or(0);
    Ok(PlanReport {
        gpus,
        ranks: plan.ranks().iter().map(|shard| rank(spec, &plan, shard, config)).collect(),
        parameters: spec.parameters(),
        replicated_parameters: plan.replicated_parameters(),
        imbalance: plan.imbalance(config.format),
        head_imbalance: (most_heads * gpus) as f64 / spec.query_heads as f64,
        formats: formats.collect::<Result<_>>()?,
        all_reduces,
        decode_all_reduce_bytes: exchanged(config.batch),
        prefill_all_reduce_bytes: exchanged(config.chunk),
        decode_tokens_per_second: speed(decode),
        prefill_tokens_per_second: speed(prefill),
    })
}

fn shards(spec: &ModelSpec, gpus: usize, config: &PlanConfig, format: WeightFormat) -> Result<ShardPlan> {
    let options = ShardOptions {
        expert_parallel: config.expert_parallel,
        quantisation_group: format.quantisation_group(),
        ..ShardOptions::default()
    };
    ShardPlan::new(spec, gpus, &options)
}

fn rank(spec: &ModelSpec, plan: &ShardPlan, shard: &RankShard, config: &PlanConfig) -> RankReport {
    let weight_bytes = plan.weight_bytes(shard, config.format);
    let kv_bytes_per_token = kv_bytes_per_token(spec, shard, config.kv_element_bytes);
    RankReport {
        rank: shard.rank,
        query_heads: shard.query_heads.clone(),
        kv_heads: shard.kv_heads.clone(),
        columns: if has_dense_layers(spec) { shard.columns.clone() } else { 0..0 },
        shared_columns: shard.shared_columns.clone(),
        experts: shard.experts.clone(),
        expert_columns: shard.expert_columns.clone(),
        vocabulary: shard.vocabulary.clone(),
        parameters: plan.parameters(shard),
        weight_bytes,
        kv_bytes_per_token,
        kv_tokens: config.usable_memory.saturating_sub(weight_bytes).checked_div(kv_bytes_per_token),
    }
}

fn has_dense_layers(spec: &ModelSpec) -> bool {
    (0..spec.layers).any(|layer| !spec.is_sparse(layer))
}

fn fit(spec: &ModelSpec, plan: &ShardPlan, config: &PlanConfig, format: WeightFormat) -> FormatReport {
    let free = |shard: &RankShard| {
        let free = config.usable_memory.checked_sub(plan.weight_bytes(shard, format))?;
        let kv = kv_bytes_per_token(spec, shard, config.kv_element_bytes);
        // A rank without KV heads sets no limit.
        Some(free.checked_div(kv).unwrap_or(u64::MAX))
    };
    let kv_tokens = plan.ranks().iter().map(free).min().flatten().unwrap_or(0);
    FormatReport {
        dtype: format.to_string(),
        weight_bytes: plan.ranks().iter().map(|s| plan.weight_bytes(s, format)).max().unwrap_or(0),
        fits: kv_tokens > 0,
        kv_tokens,
        context: kv_tokens.min(config.max_model_len as u64),
    }
}

#[cfg(test)]
mod tests {
    use longhaul_backend::DType;
    use longhaul_model::family;

    use super::*;

    fn config(usable_memory: u64) -> PlanConfig {
        PlanConfig {
            format: WeightFormat::Float(DType::BF16),
            kv_element_bytes: 2,
            expert_parallel: false,
            usable_memory,
            max_model_len: 131_072,
            batch: 1,
            context: 2048,
            chunk: 2048,
            roofline: Roofline::default(),
        }
    }

    #[test]
    fn memory_that_does_not_hold_the_weights_fits_nothing() {
        let spec = family("qwen2-72b").unwrap().spec;
        let report = plan(&spec, 1, &config(80 << 30)).unwrap();
        let fits: Vec<_> = report.formats.iter().map(|f| (f.dtype.as_str(), f.fits)).collect();
        assert_eq!(fits, [("bfloat16", false), ("fp8", true), ("int4-g128", true)]);
        assert_eq!(report.ranks[0].kv_tokens, Some(0));
        // 41.2 GB of weights; 320 KiB of cache a token.
        let int4 = &report.formats[2];
        assert_eq!(int4.kv_tokens, ((80 << 30) - int4.weight_bytes) / (320 << 10));
        assert_eq!(int4.context, int4.kv_tokens.min(131_072));
    }

    #[test]
    fn the_fullest_rank_limits_the_cache() {
        let spec = family("qwen2-7b").unwrap().spec;
        let report = plan(&spec, 3, &config(40 << 30)).unwrap();
        let least = report.ranks.iter().filter_map(|r| r.kv_tokens).min();
        assert_eq!(Some(report.formats[0].kv_tokens), least);
        let held: u64 = report.ranks.iter().map(|r| r.parameters).sum();
        assert_eq!(held - report.replicated_parameters, spec.parameters());
        assert!((report.head_imbalance - 30.0 / 28.0).abs() < 1e-12);
        assert_eq!(report.decode_all_reduce_bytes, 57 * 2 * 3584);
    }

    #[test]
    fn one_gpu_exchanges_nothing_and_ranks_without_heads_set_no_limit() {
        let spec = family("qwen2-0.5b").unwrap().spec;
        let one = plan(&spec, 1, &config(1 << 30)).unwrap();
        assert_eq!((one.all_reduces, one.decode_all_reduce_bytes), (0, 0));
        let sixteen = plan(&spec, 16, &config(1 << 30)).unwrap();
        assert_eq!(sixteen.ranks[15].kv_tokens, None);
        assert!(sixteen.formats[0].kv_tokens > 0);
    }
}
