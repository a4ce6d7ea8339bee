//! The attention kernel: one tile of query rows of one KV head against a run of key blocks, online softmax.
//!
//! Single pass with the query operand replaced at chunk boundaries: since the mask of Dual Chunk Attention is the causal
//! mask and one softmax spans all ranges, DCA is causal flash attention whose Q is re-rotated (from the raw q, in f32)
//! when the key loop enters another chunk. Plain RoPE is the case of one chunk.
//!
//! A row's result depends on nothing but its own q and keys: tiles are absolute KV blocks, partitions are absolute runs
//! of keys, and every sum has a fixed order. So any chunking of a prompt, any batch and any thread count give the same bits.
use longhaul_backend::{DType, Error, Result, RopeTables};

use super::tile::{Geometry, ROWS, Rows, Scratch};
use super::{tile_bf16, tile_f32};
use crate::kv::{KvCache, KvTile};
use crate::linear::pair;
use crate::simd::{Simd, SimdOp};

/// Keys after which the running softmax is closed and merged: the unit of parallel decode.
pub(super) const PARTITION: usize = 4096;

/// Rows `first_row .. first_row + tokens` of the step, query heads of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueryTile<'a> {
    /// Unrotated q of the tile's tokens, `[tokens][query_heads * head_dim]`.
    pub q: &'a [f32],
    /// fp32 factor per token.
    pub scales: &'a [f32],
    /// Absolute position of the first token.
    pub first_position: usize,
    pub tokens: usize,
    pub kv_head: usize,
    /// The first query head of this rank that reads it, and how many do.
    pub first_head: usize,
    pub group: usize,
    pub layer: usize,
    pub block_table: &'a [u32],
}

/// Running softmax of the rows of a tile: `o` is unnormalised, `m` in units of log2.
#[derive(Debug)]
pub(super) struct Partial {
    /// `[rows]`
    pub m: Vec<f32>,
    /// `[rows][16]`: partial sums by lane.
    pub l: Vec<f32>,
    /// `[rows][value_stride]`
    pub o: Vec<f32>,
}

impl Partial {
    fn new(rows: usize, stride: usize) -> Self {
        Self { m: vec![f32::NEG_INFINITY; rows], l: vec![0.0; rows * 16], o: vec![0.0; rows * stride] }
    }

    /// Adds the softmax of later keys; both sides keep their own maximum.
    pub fn merge(&mut self, later: &Partial) {
        let stride = self.o.len() / self.m.len().max(1);
        for row in 0..self.m.len() {
            let m = self.m[row].max(later.m[row]);
            if m == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.m[row] - m).exp2(), (later.m[row] - m).exp2());
            let pairs = [
                (&mut self.l[row * 16..][..16], &later.l[row * 16..][..16]),
                (&mut self.o[row * stride..][..stride], &later.o[row * stride..][..stride]),
            ];
            for (ours, theirs) in pairs {
                for (x, y) in ours.iter_mut().zip(theirs) {
                    *x = *x * a + y * b;
                }
            }
            self.m[row] = m;
        }
    }

    /// Divides by the sums and writes `[tokens][group * head_dim]` heads to `out`.
    pub fn finish(&self, head_dim: usize, out: &mut [f32]) {
        let stride = self.o.len() / self.m.len().max(1);
        for (row, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let sum: f32 = self.l[row * 16..][..16].iter().sum();
            for (x, o) in out.iter_mut().zip(&self.o[row * stride..]) {
                *x = o / sum;
            }
        }
    }
}

/// Attention of a tile over the partitions `partitions`, merged in order.
pub(super) struct Attend<'a> {
    pub tile: QueryTile<'a>,
    pub kv: &'a KvCache,
    pub rope: &'a RopeTables,
    pub partitions: std::ops::Range<usize>,
}

impl SimdOp for Attend<'_> {
    type Output = Result<Partial>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Result<Partial> {
        let mut total: Option<Partial> = None;
        let mut queries = Queries::new(&self);
        for partition in self.partitions.clone() {
            let partial = self.partition(s, partition, &mut queries)?;
            match &mut total {
                None => total = Some(partial),
                Some(total) => total.merge(&partial),
            }
        }
        total.ok_or_else(|| Error::shape("attention", "no keys to attend to"))
    }
}

/// The rotated, scaled query rows of a tile, `[rows][head_dim]`, row = token · group + head.
struct Queries {
    rotated: Vec<f32>,
    /// The same rounded to bf16, as pairs: what meets a bf16 cache.
    pairs: Option<Vec<u32>>,
    /// Table row that each token is rotated at now.
    current: Vec<Option<u32>>,
}

impl Queries {
    fn new(job: &Attend) -> Self {
        let layout = job.kv.layout();
        let tokens = job.tile.tokens;
        let values = tokens * job.tile.group * layout.head_dim;
        Self {
            rotated: vec![0.0; values],
            pairs: (layout.dtype == DType::BF16).then(|| vec![0; values / 2]),
            current: vec![None; tokens],
        }
    }

    /// Rotates every token for keys of the chunk that holds `key`; a no-op where the operand stays the same.
    #[inline(always)]
    fn rotate_for(&mut self, job: &Attend, key: usize) -> Result<()> {
        let layout = job.kv.layout();
        let (head_dim, group) = (layout.head_dim, job.tile.group);
        let half = head_dim / 2;
        let token_size = layout.query_heads * head_dim;
        for (token, current) in self.current.iter_mut().enumerate() {
            let position = (job.tile.first_position + token) as u32;
            let wanted = match job.rope.chunking {
                Some(chunking) => chunking.query_row(position, key as u32 / chunking.len()),
                None => position,
            };
            if *current == Some(wanted) {
                continue;
            }
            let (cos, sin) = job.rope.row(wanted).ok_or_else(|| beyond_tables(wanted, job.rope))?;
            // exp(x) = 2^(x · log2 e): the factor goes into q once instead of into every score.
            let scale = job.tile.scales[token] * std::f32::consts::LOG2_E;
            for head in 0..group {
                let from = &job.tile.q[token * token_size + (job.tile.first_head + head) * head_dim..];
                let to = &mut self.rotated[(token * group + head) * head_dim..][..head_dim];
                let (lower, upper) = to.split_at_mut(half);
                for d in 0..half {
                    let (a, b) = (from[d], from[d + half]);
                    lower[d] = (a * cos[d] - b * sin[d]) * scale;
                    upper[d] = (b * cos[d] + a * sin[d]) * scale;
                }
            }
            if let Some(pairs) = &mut self.pairs {
                let values = group * head_dim;
                let from = self.rotated[token * values..][..values].as_chunks::<2>().0;
                for (pair_of, [a, b]) in pairs[token * values / 2..].iter_mut().zip(from) {
                    *pair_of = pair(*a, *b);
                }
            }
            *current = Some(wanted);
        }
        Ok(())
    }
}

/// A position that the rotation tables do not reach.
pub(super) fn beyond_tables(row: u32, rope: &RopeTables) -> Error {
    Error::Step(format!("position {row} is beyond the {} rows of the rotation tables", rope.rows))
}

impl Attend<'_> {
    #[inline(always)]
    fn partition<S: Simd>(&self, s: S, partition: usize, queries: &mut Queries) -> Result<Partial> {
        let layout = self.kv.layout();
        let (block_size, group) = (layout.block_size, self.tile.group);
        let rows = self.tile.tokens * group;
        let value_stride = self.kv.value_stride();
        let mut state = Partial::new(rows, value_stride);
        let last_position = self.tile.first_position + self.tile.tokens - 1;
        let end = (last_position + 1).min((partition + 1) * PARTITION);
        let chunk = self.rope.chunking.map_or(usize::MAX, |c| c.len() as usize);
        let mut rotated_chunk = None;
        let mut scratch = Scratch::default();
        for first_key in (partition * PARTITION..end).step_by(block_size) {
            if rotated_chunk != Some(first_key / chunk) {
                queries.rotate_for(self, first_key)?;
                rotated_chunk = Some(first_key / chunk);
            }
            let block = self.tile.block_table[first_key / block_size] as usize;
            let tile = self
                .kv
                .tile(self.tile.layer, block, self.tile.kv_head)
                .ok_or_else(|| Error::Step(format!("block {block} is outside the KV pool")))?;
            // Tokens before the block see none of it.
            let first_token = first_key.saturating_sub(self.tile.first_position);
            let mut row = first_token * group;
            while row < rows {
                let count = ROWS.min(rows - row);
                let visible: [usize; ROWS] = std::array::from_fn(|r| {
                    let position = self.tile.first_position + (row + r.min(count - 1)) / group;
                    (position + 1 - first_key).min(block_size)
                });
                let geometry = Geometry {
                    head_dim: layout.head_dim,
                    key_stride: self.kv.key_stride(),
                    value_stride,
                    visible,
                };
                let rows_of = Rows {
                    m: &mut state.m[row..][..count],
                    l: &mut state.l[row * 16..][..count * 16],
                    o: &mut state.o[row * value_stride..][..count * value_stride],
                };
                let first = row * layout.head_dim;
                match (tile, &queries.pairs) {
                    (KvTile::F32 { k, v }, _) => {
                        let q = &queries.rotated[first..][..count * layout.head_dim];
                        tile_f32::rows(s, count, q, (k, v), rows_of, geometry, &mut scratch);
                    }
                    (KvTile::Bf16 { k, v }, Some(pairs)) => {
                        let q = &pairs[first / 2..][..count * layout.head_dim / 2];
                        tile_bf16::rows(s, count, q, (k, v), rows_of, geometry, &mut scratch);
                    }
                    (KvTile::Bf16 { .. }, None) => {
                        return Err(Error::shape("attention", "a bf16 tile in a cache of another dtype"));
                    }
                }
                row += count;
            }
        }
        Ok(state)
    }
}
