//! The attention kernel: one tile of query rows of one KV head against a run of key blocks, online softmax.
//!
//! Single pass with the query operand replaced at chunk boundaries: since the mask of Dual Chunk Attention is the causal
//! mask and one softmax spans all ranges, DCA is causal flash attention whose Q is re-rotated (from the raw q, in f32)
//! when the key loop enters another chunk. Plain RoPE is the case of one chunk.
//!
//! A row's result depends on nothing but its own q and keys: tiles are absolute KV blocks, partitions are absolute runs
//! of keys, and every sum has a fixed order. So any chunking of a prompt, any batch and any thread count give the same bits.
#![allow(unsafe_code)]

use longhaul_backend::{Error, Result, RopeTables};

use crate::kv::{KvCache, KvTile};
use crate::simd::{Simd, SimdOp};

/// Keys after which the running softmax is closed and merged: the unit of parallel decode.
pub(super) const PARTITION: usize = 4096;
/// Query rows of the register block.
const ROWS: usize = 6;
/// Keys of the largest block.
const KEYS: usize = 64;

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
    /// Table row that each token is rotated at now.
    current: Vec<Option<u32>>,
}

impl Queries {
    fn new(job: &Attend) -> Self {
        let layout = job.kv.layout();
        let tokens = job.tile.tokens;
        Self { rotated: vec![0.0; tokens * layout.group() * layout.head_dim], current: vec![None; tokens] }
    }

    /// Rotates every token for keys of the chunk that holds `key`; a no-op where the operand stays the same.
    #[inline(always)]
    fn rotate_for(&mut self, job: &Attend, key: usize) -> Result<()> {
        let layout = job.kv.layout();
        let (head_dim, group) = (layout.head_dim, layout.group());
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
                let from = &job.tile.q[token * token_size + (job.tile.kv_head * group + head) * head_dim..];
                let to = &mut self.rotated[(token * group + head) * head_dim..][..head_dim];
                let (lower, upper) = to.split_at_mut(half);
                for d in 0..half {
                    let (a, b) = (from[d], from[d + half]);
                    lower[d] = (a * cos[d] - b * sin[d]) * scale;
                    upper[d] = (b * cos[d] + a * sin[d]) * scale;
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
        let (block_size, group) = (layout.block_size, layout.group());
        let rows = self.tile.tokens * group;
        let value_stride = self.kv.value_stride();
        let mut state = Partial::new(rows, value_stride);
        let last_position = self.tile.first_position + self.tile.tokens - 1;
        let end = (last_position + 1).min((partition + 1) * PARTITION);
        let chunk = self.rope.chunking.map_or(usize::MAX, |c| c.len() as usize);
        let mut rotated_chunk = None;
        let mut scores = [[0.0f32; KEYS]; ROWS];
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
                    q: &queries.rotated[row * layout.head_dim..][..count * layout.head_dim],
                    m: &mut state.m[row..][..count],
                    l: &mut state.l[row * 16..][..count * 16],
                    o: &mut state.o[row * value_stride..][..count * value_stride],
                };
                match count {
                    1 => block_rows::<S, 1>(s, rows_of, tile, geometry, &mut scores),
                    2 => block_rows::<S, 2>(s, rows_of, tile, geometry, &mut scores),
                    3 => block_rows::<S, 3>(s, rows_of, tile, geometry, &mut scores),
                    4 => block_rows::<S, 4>(s, rows_of, tile, geometry, &mut scores),
                    5 => block_rows::<S, 5>(s, rows_of, tile, geometry, &mut scores),
                    _ => block_rows::<S, ROWS>(s, rows_of, tile, geometry, &mut scores),
                }
                row += count;
            }
        }
        Ok(state)
    }
}

struct Rows<'a> {
    q: &'a [f32],
    m: &'a mut [f32],
    l: &'a mut [f32],
    o: &'a mut [f32],
}

#[derive(Clone, Copy)]
struct Geometry {
    head_dim: usize,
    key_stride: usize,
    value_stride: usize,
    /// Keys of the block that each row may see; ascending, at least 1.
    visible: [usize; ROWS],
}

/// `R` rows against one block: scores, online softmax, weighted values.
#[inline(always)]
fn block_rows<S: Simd, const R: usize>(
    s: S,
    rows: Rows<'_>,
    tile: KvTile<'_>,
    g: Geometry,
    scores: &mut [[f32; KEYS]; ROWS],
) {
    let keys = g.visible[R - 1];
    let padded = keys.next_multiple_of(16);
    // 64 keys at a time where 16 lanes and 32 registers allow it.
    let mut key = 0;
    if S::LANES == 16 {
        while key + 64 <= padded {
            score_block::<S, R, 4>(s, rows.q, tile.k, key, g, scores);
            key += 64;
        }
    }
    while key < padded {
        if S::LANES == 16 {
            score_block::<S, R, 1>(s, rows.q, tile.k, key, g, scores);
        } else {
            score_block::<S, R, 2>(s, rows.q, tile.k, key, g, scores);
        }
        key += 16;
    }
    for r in 0..R {
        softmax_row(s, &mut scores[r], g.visible[r], padded, r, rows.m, rows.l, rows.o, g.value_stride);
    }
    let mut column = 0;
    if S::LANES == 16 {
        while column + 64 <= g.value_stride {
            value_block::<S, R, 4>(s, scores, tile.v, keys, column, g, rows.o);
            column += 64;
        }
        while column + 32 <= g.value_stride {
            value_block::<S, R, 2>(s, scores, tile.v, keys, column, g, rows.o);
            column += 32;
        }
        while column < g.value_stride {
            value_block::<S, R, 1>(s, scores, tile.v, keys, column, g, rows.o);
            column += 16;
        }
    } else {
        while column < g.value_stride {
            value_block::<S, R, 2>(s, scores, tile.v, keys, column, g, rows.o);
            column += 16;
        }
    }
}

/// `scores[r][key..] = q[r] · k` for `N` vectors of keys.
#[inline(always)]
fn score_block<S: Simd, const R: usize, const N: usize>(
    s: S,
    q: &[f32],
    k: &[f32],
    key: usize,
    g: Geometry,
    scores: &mut [[f32; KEYS]; ROWS],
) {
    assert!(q.len() >= R * g.head_dim && k.len() >= g.head_dim * g.key_stride);
    assert!(key + N * S::LANES <= g.key_stride && key + N * S::LANES <= KEYS);
    let mut acc = [[s.splat(0.0); N]; R];
    for d in 0..g.head_dim {
        // SAFETY: `d < head_dim` and `key + N * LANES <= key_stride`, so the last element read is below
        // `head_dim * key_stride <= k.len()`; likewise `r * head_dim + d < R * head_dim <= q.len()`.
        unsafe {
            let line = k.as_ptr().add(d * g.key_stride + key);
            let keys: [S::F32; N] = std::array::from_fn(|n| s.load_ptr(line.add(n * S::LANES)));
            for r in 0..R {
                let x = s.splat(*q.get_unchecked(r * g.head_dim + d));
                for n in 0..N {
                    acc[r][n] = s.mul_add(x, keys[n], acc[r][n]);
                }
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            s.store(acc[r][n], &mut scores[r][key + n * S::LANES..]);
        }
    }
}

/// Turns a row of scores into weights `2^(score - m)`, with the running maximum, sum and output brought to the new `m`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn softmax_row<S: Simd>(
    s: S,
    scores: &mut [f32; KEYS],
    visible: usize,
    padded: usize,
    r: usize,
    m: &mut [f32],
    l: &mut [f32],
    o: &mut [f32],
    value_stride: usize,
) {
    let masked = visible < padded;
    if masked {
        scores[visible..padded].fill(f32::NEG_INFINITY);
    }
    let mut top = s.load(&scores[..]);
    for key in (S::LANES..padded).step_by(S::LANES) {
        top = s.max(s.load(&scores[key..]), top);
    }
    let old = m[r];
    let new = old.max(s.reduce_max(top));
    m[r] = new;
    let shift = s.splat(new);
    let lanes = &mut l[r * 16..][..16];
    if new != old {
        let factor = s.splat((old - new).exp2());
        for at in (0..16).step_by(S::LANES) {
            let v = s.mul(s.load(&lanes[at..]), factor);
            s.store(v, &mut lanes[at..]);
        }
        let row = &mut o[r * value_stride..][..value_stride];
        for at in (0..value_stride).step_by(S::LANES) {
            let v = s.mul(s.load(&row[at..]), factor);
            s.store(v, &mut row[at..]);
        }
    }
    for key in (0..padded).step_by(S::LANES) {
        let p = exp2_of_negative(s, s.sub(s.load(&scores[key..]), shift));
        s.store(p, &mut scores[key..]);
    }
    if masked {
        scores[visible..padded].fill(0.0);
    }
    for key in (0..padded).step_by(16) {
        for at in (0..16).step_by(S::LANES) {
            let v = s.add(s.load(&lanes[at..]), s.load(&scores[key + at..]));
            s.store(v, &mut lanes[at..]);
        }
    }
}

/// `2^x` for `x <= 0` within 2 ulp; everything below -126 gives 2^-126. Polynomial of Cephes `exp2f`.
#[inline(always)]
fn exp2_of_negative<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let x = s.max(x, s.splat(-126.0));
    let n = s.round(x);
    let f = s.sub(x, n);
    let mut p = s.splat(1.535_336_2e-4);
    for c in [1.339_887_5e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
        p = s.mul_add(p, f, s.splat(c));
    }
    s.mul(p, s.exp2_int(n))
}

/// `o[r][column..] += Σ_key scores[r][key] · v[key][column..]` for `N` vectors of columns.
#[inline(always)]
fn value_block<S: Simd, const R: usize, const N: usize>(
    s: S,
    scores: &[[f32; KEYS]; ROWS],
    v: &[f32],
    keys: usize,
    column: usize,
    g: Geometry,
    o: &mut [f32],
) {
    assert!(keys <= KEYS && v.len() >= keys * g.value_stride && o.len() >= R * g.value_stride);
    assert!(column + N * S::LANES <= g.value_stride);
    let mut acc: [[S::F32; N]; R] = std::array::from_fn(|r| {
        std::array::from_fn(|n| s.load(&o[r * g.value_stride + column + n * S::LANES..]))
    });
    for key in 0..keys {
        // SAFETY: `key < keys` and `column + N * LANES <= value_stride`, so the last element read is below
        // `keys * value_stride <= v.len()`; `key < KEYS` bounds the scores.
        unsafe {
            let line = v.as_ptr().add(key * g.value_stride + column);
            let values: [S::F32; N] = std::array::from_fn(|n| s.load_ptr(line.add(n * S::LANES)));
            for r in 0..R {
                let weight = s.splat(*scores.get_unchecked(r).get_unchecked(key));
                for n in 0..N {
                    acc[r][n] = s.mul_add(weight, values[n], acc[r][n]);
                }
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            s.store(acc[r][n], &mut o[r * g.value_stride + column + n * S::LANES..]);
        }
    }
}
