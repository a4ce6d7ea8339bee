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

/// Turns a row of scores into weights `2^(score - m)`, with the running maximum, sum and output brought to the new `m`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn softmax_row<S: Simd>(
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

