//! What the tile kernels of every cache dtype share: geometry, scratch, the online softmax of a row.

use crate::simd::Simd;

/// Query rows of the register block.
pub(super) const ROWS: usize = 6;
/// Keys of the largest block.
pub(super) const KEYS: usize = 64;

/// Running softmax of the rows at hand.
pub(super) struct Rows<'a> {
    pub m: &'a mut [f32],
    pub l: &'a mut [f32],
    pub o: &'a mut [f32],
}

#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub head_dim: usize,
    pub key_stride: usize,
    pub value_stride: usize,
    /// Keys of the block that each row may see; ascending, at least 1.
    pub visible: [usize; ROWS],
}

/// Scores, then weights, of the rows at hand against one block.
#[repr(align(64))]
pub(super) struct Scratch {
    pub scores: [[f32; KEYS]; ROWS],
    /// Weights as bf16 pairs of neighbouring keys.
    pub pairs: [[u32; KEYS / 2]; ROWS],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { scores: [[0.0; KEYS]; ROWS], pairs: [[0; KEYS / 2]; ROWS] }
    }
}

/// How closely `2^x` is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Exp {
    /// Within 2 ulp (polynomial of Cephes `exp2f`).
    F32,
    /// Within 7.5e-5: weights that are rounded to bf16 (2^-9) need no more.
    Bf16,
}

/// Turns a row of scores into weights `2^(score - m)`, with the running maximum, sum and output brought to the new `m`.
///
/// Row `r` of `rows` sees the first `visible` of `padded` keys; weights of the others become 0.
#[inline(always)]
pub(super) fn softmax_row<S: Simd>(
    s: S,
    exp: Exp,
    scores: &mut [f32; KEYS],
    (visible, padded): (usize, usize),
    r: usize,
    rows: &mut Rows<'_>,
    value_stride: usize,
) {
    if visible < padded {
        scores[visible..padded].fill(f32::NEG_INFINITY);
    }
    // The usual case is a whole block: a constant length unrolls.
    let m = if padded == KEYS {
        update_maximum(s, &scores[..], r, rows, value_stride)
    } else {
        update_maximum(s, &scores[..padded], r, rows, value_stride)
    };
    let sums = &mut rows.l[r * 16..][..16];
    if padded == KEYS {
        weigh(s, exp, &mut scores[..], visible, m, sums);
    } else {
        weigh(s, exp, &mut scores[..padded], visible, m, sums);
    }
}

/// The row's new maximum; its sum and output are scaled to it.
#[inline(always)]
fn update_maximum<S: Simd>(
    s: S,
    scores: &[f32],
    r: usize,
    rows: &mut Rows<'_>,
    value_stride: usize,
) -> S::F32 {
    let mut top = s.load(scores);
    for key in (S::LANES..scores.len()).step_by(S::LANES) {
        top = s.max(s.load(&scores[key..]), top);
    }
    let old = rows.m[r];
    // Mostly the maximum stands, and one comparison says so.
    if !s.any_greater(top, s.splat(old)) {
        return s.splat(old);
    }
    let new = old.max(s.reduce_max(top));
    rows.m[r] = new;
    let factor = s.splat((old - new).exp2());
    for values in [&mut rows.l[r * 16..][..16], &mut rows.o[r * value_stride..][..value_stride]] {
        for at in (0..values.len()).step_by(S::LANES) {
            let v = s.mul(s.load(&values[at..]), factor);
            s.store(v, &mut values[at..]);
        }
    }
    s.splat(new)
}

/// Scores to weights, and the weights onto the sums by lane.
#[inline(always)]
fn weigh<S: Simd>(s: S, exp: Exp, scores: &mut [f32], visible: usize, m: S::F32, sums: &mut [f32]) {
    for key in (0..scores.len()).step_by(S::LANES) {
        let p = exp2_of_negative(s, exp, s.sub(s.load(&scores[key..]), m));
        s.store(p, &mut scores[key..]);
    }
    if visible < scores.len() {
        scores[visible..].fill(0.0);
    }
    for at in (0..16).step_by(S::LANES) {
        let mut sum = s.load(&sums[at..]);
        for key in (at..scores.len()).step_by(16) {
            sum = s.add(sum, s.load(&scores[key..]));
        }
        s.store(sum, &mut sums[at..]);
    }
}

/// `2^x` for `x <= 0`; everything below -126 gives 2^-126, NaN stays NaN.
#[inline(always)]
fn exp2_of_negative<S: Simd>(s: S, exp: Exp, x: S::F32) -> S::F32 {
    // `max` returns its second operand when either is NaN.
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    let f = s.sub(x, n);
    let p = match exp {
        Exp::F32 => {
            let mut p = s.splat(1.535_336_2e-4);
            for c in [1.339_887_5e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
                p = s.mul_add(p, f, s.splat(c));
            }
            p
        }
        Exp::Bf16 => {
            let mut p = s.splat(5.517_166e-2);
            for c in [2.426_111_4e-1, 6.932_61e-1, 9.999_281e-1] {
                p = s.mul_add(p, f, s.splat(c));
            }
            p
        }
    };
    s.scale_exp2(p, n)
}
