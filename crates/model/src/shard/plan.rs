use std::ops::Range;

use longhaul_backend::{DType, HeadGroups, KvLayout, Widths};
use longhaul_weights::{Slice, TensorSpec};

use super::{columns, heads};
use crate::{Mlp, ModelError, ModelSpec, Result, Role, WeightFormat};

/// Most ranks of a group.
const MOST_RANKS: usize = 1024;

/// How a model is dealt over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardOptions {
    /// Deal routed experts whole instead of cutting each by columns.
    pub expert_parallel: bool,
    /// MLP columns and vocabulary rows are cut at multiples of this: what the matrix kernels like.
    pub column_multiple: usize,
    /// MLP columns are cut at multiples of this instead: a quantised matrix's columns that share a scale.
    pub quantisation_group: Option<usize>,
}

impl Default for ShardOptions {
    fn default() -> Self {
        Self { expert_parallel: false, column_multiple: 16, quantisation_group: None }
    }
}

/// What one rank holds of a model: ranges of the whole model's heads, columns, experts and rows; any may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankShard {
    /// This rank, `0..world_size`.
    pub rank: usize,
    /// Ranks of the group.
    pub world_size: usize,
    /// Query heads.
    pub query_heads: Range<usize>,
    /// The KV heads that those read. Other ranks may hold some of them, too.
    pub kv_heads: Range<usize>,
    /// Columns of the MLP of dense layers.
    pub columns: Range<usize>,
    /// Columns of the shared expert.
    pub shared_columns: Range<usize>,
    /// Routed experts.
    pub experts: Range<usize>,
    /// Columns of each of them.
    pub expert_columns: Range<usize>,
    /// Rows of embedding and output head: token ids.
    pub vocabulary: Range<usize>,
    head_dim: usize,
    /// Query heads of a whole KV group.
    group: usize,
}

impl RankShard {
    /// The only rank of a group of one: it holds everything.
    pub fn whole(spec: &ModelSpec) -> Self {
        let moe = spec.moe.as_ref();
        Self {
            rank: 0,
            world_size: 1,
            query_heads: 0..spec.query_heads,
            kv_heads: 0..spec.kv_heads,
            columns: 0..spec.intermediate_size,
            shared_columns: 0..moe.map_or(0, |m| m.shared_intermediate_size),
            experts: 0..moe.map_or(0, |m| m.experts),
            expert_columns: 0..moe.map_or(0, |m| m.intermediate_size),
            vocabulary: 0..spec.vocab_size,
            head_dim: spec.head_dim,
            group: spec.query_heads / spec.kv_heads,
        }
    }

    /// How this rank's query heads fall on its KV heads.
    pub fn head_groups(&self) -> HeadGroups {
        let whole = |head: usize| head.is_multiple_of(self.group);
        if self.kv_heads.len() < 2 || (whole(self.query_heads.start) && whole(self.query_heads.end)) {
            HeadGroups::Even
        } else {
            HeadGroups::Cut { size: self.group, skipped: self.query_heads.start % self.group }
        }
    }

    /// The rank's KV pool of `blocks` blocks of `block_size` tokens.
    pub fn kv_layout(&self, spec: &ModelSpec, block_size: usize, blocks: usize, dtype: DType) -> KvLayout {
        KvLayout {
            layers: spec.layers,
            query_heads: self.query_heads.len(),
            kv_heads: self.kv_heads.len(),
            groups: self.head_groups(),
            head_dim: spec.head_dim,
            block_size,
            blocks,
            dtype,
        }
    }

    /// The widths that decide the memory of this rank's steps.
    pub fn widths(&self, spec: &ModelSpec) -> Widths {
        let group = match self.head_groups() {
            HeadGroups::Even => self.query_heads.len() / self.kv_heads.len().max(1),
            HeadGroups::Cut { size, .. } => size,
        };
        let moe = spec.moe.as_ref();
        Widths {
            hidden: spec.hidden_size,
            qkv: (self.query_heads.len() + 2 * self.kv_heads.len()) * self.head_dim,
            query: self.query_heads.len() * self.head_dim,
            whole_groups: group * self.kv_heads.len() * self.head_dim,
            intermediate: self.columns.len().max(self.shared_columns.len()),
            expert_intermediate: if self.experts.is_empty() { 0 } else { self.expert_columns.len() },
            experts: moe.map_or(0, |m| m.experts),
            top_k: moe.map_or(0, |m| m.top_k),
            vocabulary: self.vocabulary.len(),
            whole_vocabulary: spec.vocab_size,
        }
    }

    /// The part of a tensor of `role` that this rank holds; empty where it holds nothing.
    pub fn slice(&self, role: Role) -> Slice {
        let of_heads = |heads: &Range<usize>| heads.start * self.head_dim..heads.end * self.head_dim;
        match role {
            Role::Replicated => Slice::All,
            Role::Embedding | Role::Head => Slice::Rows(self.vocabulary.clone()),
            Role::Query => Slice::Rows(of_heads(&self.query_heads)),
            Role::KeyValue => Slice::Rows(of_heads(&self.kv_heads)),
            Role::Output => Slice::Cols(of_heads(&self.query_heads)),
            Role::Up(mlp) => Slice::Rows(self.mlp_columns(mlp)),
            Role::Down(mlp) => Slice::Cols(self.mlp_columns(mlp)),
        }
    }

    /// The columns of `mlp` that this rank holds.
    pub fn mlp_columns(&self, mlp: Mlp) -> Range<usize> {
        match mlp {
            Mlp::Dense => self.columns.clone(),
            Mlp::Shared => self.shared_columns.clone(),
            Mlp::Expert(expert) if self.experts.contains(&expert) => self.expert_columns.clone(),
            Mlp::Expert(_) => 0..0,
        }
    }
}

/// Which part of every weight each rank of a group holds.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    ranks: Vec<RankShard>,
    options: ShardOptions,
    manifest: Vec<(TensorSpec, Role)>,
}

impl ShardPlan {
    /// Deals the model over `world_size` ranks.
    ///
    /// # Errors
    /// [`ModelError::Shard`] for no rank or too many, a multiple of 0, or expert parallelism without experts.
    pub fn new(spec: &ModelSpec, world_size: usize, options: &ShardOptions) -> Result<Self> {
        let refuse = |message: String| Err(ModelError::Shard(message));
        if world_size == 0 || world_size > MOST_RANKS {
            return refuse(format!("{world_size} ranks: a group has from 1 to {MOST_RANKS}"));
        }
        let unit = options.quantisation_group.unwrap_or(options.column_multiple);
        if unit == 0 || options.column_multiple == 0 {
            return refuse("columns cannot be cut at multiples of 0".into());
        }
        if options.expert_parallel && spec.moe.is_none() {
            return refuse("--expert-parallel: the model has no experts to deal out; leave it off".into());
        }
        let whole = RankShard::whole(spec);
        let deal = |range: &Range<usize>, unit| columns::deal(range.len(), unit, world_size);
        let query_heads = heads::deal(spec.query_heads, spec.kv_heads, world_size);
        let mlp = deal(&whole.columns, unit);
        let shared = deal(&whole.shared_columns, unit);
        let expert_columns = deal(&whole.expert_columns, unit);
        let experts = deal(&whole.experts, 1);
        let vocabulary = deal(&whole.vocabulary, options.column_multiple);
        let rank = |(rank, query_heads): (usize, Range<usize>)| {
            let whole = whole.clone();
            let at = |shares: &[Range<usize>]| shares.get(rank).cloned().unwrap_or_default();
            RankShard {
                rank,
                world_size,
                kv_heads: kv_heads_of(&query_heads, whole.group),
                query_heads,
                columns: at(&mlp),
                shared_columns: at(&shared),
                experts: if options.expert_parallel { at(&experts) } else { whole.experts },
                expert_columns: if options.expert_parallel {
                    whole.expert_columns
                } else {
                    at(&expert_columns)
                },
                vocabulary: at(&vocabulary),
                ..whole
            }
        };
        let ranks = query_heads.into_iter().enumerate().map(rank).collect();
        Ok(Self { ranks, options: *options, manifest: spec.manifest() })
    }

    /// Every rank's shard, in order.
    pub fn ranks(&self) -> &[RankShard] {
        &self.ranks
    }

    /// How the model was dealt.
    pub fn options(&self) -> &ShardOptions {
        &self.options
    }

    /// Every tensor of the model with its role and the part of it that `shard` holds, empty parts included.
    pub fn tensors<'a>(
        &'a self,
        shard: &'a RankShard,
    ) -> impl Iterator<Item = (&'a TensorSpec, Role, Slice)> {
        self.manifest.iter().map(|(tensor, role)| (tensor, *role, shard.slice(*role)))
    }

    /// Sum over the parts of tensors that `shard` holds of `measure(role, rows, columns)`; a vector has one column.
    pub(crate) fn sum<T: std::iter::Sum>(
        &self,
        shard: &RankShard,
        mut measure: impl FnMut(Role, Range<usize>, Range<usize>) -> T,
    ) -> T {
        let parts = self.tensors(shard).map(|(tensor, role, slice)| {
            let rows = tensor.shape.first().copied().unwrap_or(1);
            let cols = tensor.shape.get(1).copied().unwrap_or(1);
            match slice {
                Slice::All => measure(role, 0..rows, 0..cols),
                Slice::Rows(rows) => measure(role, rows, 0..cols),
                Slice::Cols(cols) => measure(role, 0..rows, cols),
            }
        });
        parts.sum()
    }

    /// Parameters that `shard` holds, replicated ones included.
    pub fn parameters(&self, shard: &RankShard) -> u64 {
        self.sum(shard, |_, rows, cols| rows.len() as u64 * cols.len() as u64)
    }

    /// Bytes of the weights that `shard` holds, stored as `format`.
    pub fn weight_bytes(&self, shard: &RankShard, format: WeightFormat) -> u64 {
        self.sum(shard, |role, rows, cols| format.bytes(role, &rows, &cols))
    }

    /// Parameters that more than one rank holds, counted once for every rank after the first: norms, router, shared KV heads.
    /// What all ranks hold less this is [`ModelSpec::parameters`].
    pub fn replicated_parameters(&self) -> u64 {
        let held: u64 = self.ranks.iter().map(|shard| self.parameters(shard)).sum();
        let all = self.manifest.iter().map(|(t, _)| t.shape.iter().map(|&d| d as u64).product::<u64>());
        held - all.sum::<u64>()
    }

    /// The largest share of the weights over the mean share: 1 is even.
    pub fn imbalance(&self, format: WeightFormat) -> f64 {
        let bytes = || self.ranks.iter().map(|shard| self.weight_bytes(shard, format));
        let mean = bytes().sum::<u64>() as f64 / self.ranks.len() as f64;
        bytes().max().unwrap_or(0) as f64 / mean
    }

    /// The ranks that hold `kv_head`.
    pub fn holders_of(&self, kv_head: usize) -> impl Iterator<Item = usize> {
        self.ranks.iter().filter(move |shard| shard.kv_heads.contains(&kv_head)).map(|shard| shard.rank)
    }
}

/// The KV heads that `query_heads` read.
fn kv_heads_of(query_heads: &Range<usize>, group: usize) -> Range<usize> {
    if query_heads.is_empty() { 0..0 } else { query_heads.start / group..query_heads.end.div_ceil(group) }
}
