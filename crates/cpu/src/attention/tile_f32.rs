//! Rows of queries against one block of an f32 cache.
#![allow(unsafe_code)]

use super::tile::{Exp, Geometry, KEYS, ROWS, Rows, Scratch, softmax_row};
use crate::simd::Simd;

/// `count` (1 to [`ROWS`]) rows `q` `[count][head_dim]` against the block `(k, v)`.
#[inline(always)]
pub(super) fn rows<S: Simd>(
    s: S,
    count: usize,
    q: &[f32],
    kv: (&[f32], &[f32]),
    rows: Rows<'_>,
    g: Geometry,
    scratch: &mut Scratch,
) {
    let scores = &mut scratch.scores;
    match count {
        1 => block_rows::<S, 1>(s, q, kv, rows, g, scores),
        2 => block_rows::<S, 2>(s, q, kv, rows, g, scores),
        3 => block_rows::<S, 3>(s, q, kv, rows, g, scores),
        4 => block_rows::<S, 4>(s, q, kv, rows, g, scores),
        5 => block_rows::<S, 5>(s, q, kv, rows, g, scores),
        _ => block_rows::<S, ROWS>(s, q, kv, rows, g, scores),
    }
}

/// `R` rows against one block: scores, online softmax, weighted values.
#[inline(always)]
fn block_rows<S: Simd, const R: usize>(
    s: S,
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    mut rows: Rows<'_>,
    g: Geometry,
    scores: &mut [[f32; KEYS]; ROWS],
) {
    let keys = g.visible[R - 1];
    let padded = keys.next_multiple_of(16);
    // 64 keys at a time where 16 lanes and 32 registers allow it.
    let mut key = 0;
    if S::LANES == 16 {
        while key + 64 <= padded {
            score_block::<S, R, 4>(s, q, k, key, g, scores);
            key += 64;
        }
    }
    while key < padded {
        if S::LANES == 16 {
            score_block::<S, R, 1>(s, q, k, key, g, scores);
        } else {
            score_block::<S, R, 2>(s, q, k, key, g, scores);
        }
        key += 16;
    }
    for (r, (scores, visible)) in scores.iter_mut().zip(g.visible).take(R).enumerate() {
        softmax_row(s, Exp::F32, scores, (visible, padded), r, &mut rows, g.value_stride);
    }
    let mut column = 0;
    if S::LANES == 16 {
        while column + 64 <= g.value_stride {
            value_block::<S, R, 4>(s, scores, v, keys, column, g, rows.o);
            column += 64;
        }
        while column + 32 <= g.value_stride {
            value_block::<S, R, 2>(s, scores, v, keys, column, g, rows.o);
            column += 32;
        }
        while column < g.value_stride {
            value_block::<S, R, 1>(s, scores, v, keys, column, g, rows.o);
            column += 16;
        }
    } else {
        while column < g.value_stride {
            value_block::<S, R, 2>(s, scores, v, keys, column, g, rows.o);
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
            let mut keys = [s.splat(0.0); N];
            for (n, keys) in keys.iter_mut().enumerate() {
                *keys = s.load_ptr(line.add(n * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat(*q.get_unchecked(r * g.head_dim + d));
                for (acc, keys) in acc.iter_mut().zip(&keys) {
                    *acc = s.mul_add(x, *keys, *acc);
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

/// `o[r][column..] += Σ_key weights[r][key] · v[key][column..]` for `N` vectors of columns.
#[inline(always)]
fn value_block<S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: &[[f32; KEYS]; ROWS],
    v: &[f32],
    keys: usize,
    column: usize,
    g: Geometry,
    o: &mut [f32],
) {
    assert!(keys <= KEYS && v.len() >= keys * g.value_stride && o.len() >= R * g.value_stride);
    assert!(column + N * S::LANES <= g.value_stride);
    let mut acc = [[s.splat(0.0); N]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = s.load(&o[r * g.value_stride + column + n * S::LANES..]);
        }
    }
    for key in 0..keys {
        // SAFETY: `key < keys` and `column + N * LANES <= value_stride`, so the last element read is below
        // `keys * value_stride <= v.len()`; `key < KEYS` bounds the weights.
        unsafe {
            let line = v.as_ptr().add(key * g.value_stride + column);
            let mut values = [s.splat(0.0); N];
            for (n, values) in values.iter_mut().enumerate() {
                *values = s.load_ptr(line.add(n * S::LANES));
            }
            for (acc, weights) in acc.iter_mut().zip(weights) {
                let weight = s.splat(*weights.get_unchecked(key));
                for (acc, values) in acc.iter_mut().zip(&values) {
                    *acc = s.mul_add(weight, *values, *acc);
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
