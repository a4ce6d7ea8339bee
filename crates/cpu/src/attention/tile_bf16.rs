//! Rows of queries against one block of a bf16 cache: products of bf16 operands, sums in f32.
//!
//! Pairs run along head_dim for K and along keys for V, so both products are chains of pair dot products
//! (`vdpbf16ps` where the CPU has it).
#![allow(unsafe_code)]

use super::tile::{Exp, Geometry, KEYS, ROWS, Rows, Scratch, softmax_row};
use crate::simd::Simd;

/// `count` (1 to [`ROWS`]) rows `q` `[count][head_dim / 2]` of pairs against the block `(k, v)`.
#[inline(always)]
pub(super) fn rows<S: Simd>(
    s: S,
    count: usize,
    q: &[u32],
    kv: (&[u32], &[u32]),
    rows: Rows<'_>,
    g: Geometry,
    scratch: &mut Scratch,
) {
    match count {
        1 => block_rows::<S, 1>(s, q, kv, rows, g, scratch),
        2 => block_rows::<S, 2>(s, q, kv, rows, g, scratch),
        3 => block_rows::<S, 3>(s, q, kv, rows, g, scratch),
        4 => block_rows::<S, 4>(s, q, kv, rows, g, scratch),
        5 => block_rows::<S, 5>(s, q, kv, rows, g, scratch),
        _ => block_rows::<S, ROWS>(s, q, kv, rows, g, scratch),
    }
}

/// `R` rows against one block: scores, online softmax, weighted values.
#[inline(always)]
fn block_rows<S: Simd, const R: usize>(
    s: S,
    q: &[u32],
    (k, v): (&[u32], &[u32]),
    mut rows: Rows<'_>,
    g: Geometry,
    scratch: &mut Scratch,
) {
    let keys = g.visible[R - 1];
    let padded = keys.next_multiple_of(16);
    let mut key = 0;
    if S::LANES == 16 {
        while key + 64 <= padded {
            score_block::<S, R, 4>(s, q, k, key, g, &mut scratch.scores);
            key += 64;
        }
    }
    while key < padded {
        if S::LANES == 16 {
            score_block::<S, R, 1>(s, q, k, key, g, &mut scratch.scores);
        } else {
            score_block::<S, R, 2>(s, q, k, key, g, &mut scratch.scores);
        }
        key += 16;
    }
    for r in 0..R {
        let scores = &mut scratch.scores[r];
        softmax_row(s, Exp::Bf16, scores, (g.visible[r], padded), r, &mut rows, g.value_stride);
        // Whole pairs of vectors: weights beyond `padded` are stale, and no key pair reads them.
        for key in (0..padded.next_multiple_of(2 * S::LANES)).step_by(2 * S::LANES) {
            let low = s.load(&scratch.scores[r][key..]);
            let high = s.load(&scratch.scores[r][key + S::LANES..]);
            s.store_pairs(low, high, &mut scratch.pairs[r][key / 2..]);
        }
    }
    let pairs = keys.div_ceil(2);
    let mut column = 0;
    if S::LANES == 16 {
        while column + 64 <= g.value_stride {
            value_block::<S, R, 4>(s, &scratch.pairs, v, pairs, column, g, rows.o);
            column += 64;
        }
        while column + 32 <= g.value_stride {
            value_block::<S, R, 2>(s, &scratch.pairs, v, pairs, column, g, rows.o);
            column += 32;
        }
        while column < g.value_stride {
            value_block::<S, R, 1>(s, &scratch.pairs, v, pairs, column, g, rows.o);
            column += 16;
        }
    } else {
        while column < g.value_stride {
            value_block::<S, R, 2>(s, &scratch.pairs, v, pairs, column, g, rows.o);
            column += 16;
        }
    }
}

/// `scores[r][key..] = q[r] · k` for `N` vectors of keys.
#[inline(always)]
fn score_block<S: Simd, const R: usize, const N: usize>(
    s: S,
    q: &[u32],
    k: &[u32],
    key: usize,
    g: Geometry,
    scores: &mut [[f32; KEYS]; ROWS],
) {
    let half = g.head_dim / 2;
    assert!(q.len() >= R * half && k.len() >= half * g.key_stride);
    assert!(key + N * S::LANES <= g.key_stride && key + N * S::LANES <= KEYS);
    let mut acc = [[s.splat(0.0); N]; R];
    for d in 0..half {
        // SAFETY: `d < half` and `key + N * LANES <= key_stride`, so the last pair read is below
        // `half * key_stride <= k.len()`; likewise `r * half + d < R * half <= q.len()`.
        unsafe {
            let line = k.as_ptr().add(d * g.key_stride + key);
            let mut keys = [s.splat_pair(0); N];
            for (n, keys) in keys.iter_mut().enumerate() {
                *keys = s.load_pairs_ptr(line.add(n * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat_pair(*q.get_unchecked(r * half + d));
                for (acc, keys) in acc.iter_mut().zip(&keys) {
                    *acc = s.dot_pairs(*acc, x, *keys);
                }
            }
        }
    }
    for (acc, scores) in acc.iter().zip(scores) {
        for (n, acc) in acc.iter().enumerate() {
            s.store(*acc, &mut scores[key + n * S::LANES..]);
        }
    }
}

/// `o[r][column..] += Σ_key weight[r][key] · v[key][column..]` for `N` vectors of columns, two keys at a time.
#[inline(always)]
fn value_block<S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: &[[u32; KEYS / 2]; ROWS],
    v: &[u32],
    pairs: usize,
    column: usize,
    g: Geometry,
    o: &mut [f32],
) {
    assert!(pairs <= KEYS / 2 && v.len() >= pairs * g.value_stride && o.len() >= R * g.value_stride);
    assert!(column + N * S::LANES <= g.value_stride);
    let mut acc = [[s.splat(0.0); N]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = s.load(&o[r * g.value_stride + column + n * S::LANES..]);
        }
    }
    for pair in 0..pairs {
        // SAFETY: `pair < pairs` and `column + N * LANES <= value_stride`, so the last pair read is below
        // `pairs * value_stride <= v.len()`; `pair < KEYS / 2` bounds the weights.
        unsafe {
            let line = v.as_ptr().add(pair * g.value_stride + column);
            let mut values = [s.splat_pair(0); N];
            for (n, values) in values.iter_mut().enumerate() {
                *values = s.load_pairs_ptr(line.add(n * S::LANES));
            }
            for (acc, weights) in acc.iter_mut().zip(weights) {
                let weight = s.splat_pair(*weights.get_unchecked(pair));
                for (acc, values) in acc.iter_mut().zip(&values) {
                    *acc = s.dot_pairs(*acc, weight, *values);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (n, acc) in acc.iter().enumerate() {
            s.store(*acc, &mut o[r * g.value_stride + column + n * S::LANES..]);
        }
    }
}
