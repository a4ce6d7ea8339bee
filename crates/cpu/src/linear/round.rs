//! Activations rounded to bf16, once per call.
use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::simd::{Isa, Simd, SimdOp};

/// `x` rounded to bf16 (nearest, ties to even; NaN stays NaN), as the upper half of the returned word.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // Rounding could carry a NaN's payload into infinity: keep its upper half and make it quiet.
    let nan = bits | 0x0040_0000;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) & 0xffff_0000
}

/// `a` and `b` rounded to bf16, `a` in the low half.
#[inline(always)]
pub(crate) fn pair(a: f32, b: f32) -> u32 {
    round(a) >> 16 | round(b)
}

/// Rows of `cols` values as rows of pairs, the first of a pair in the low half; an odd last value is paired with 0.
struct RoundRow<'a> {
    x: &'a [f32],
    pairs: &'a mut [MaybeUninit<u32>],
}

impl SimdOp for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (whole, rest) = self.x.as_chunks::<2>();
        for (pair, &[a, b]) in self.pairs.iter_mut().zip(whole) {
            pair.write(self::pair(a, b));
        }
        if let (&[a], Some(pair)) = (rest, self.pairs.get_mut(whole.len())) {
            pair.write(round(a) >> 16);
        }
    }
}

/// All rows of `x` (`[m, cols]`) as pairs, `stride >= ceil(cols / 2)` words from row to row; words between are not written.
pub(super) fn round_rows(
    isa: Isa,
    x: &[f32],
    cols: usize,
    stride: usize,
    parallel: bool,
) -> Vec<MaybeUninit<u32>> {
    let rows = x.len() / cols;
    let mut pairs = Vec::with_capacity(rows * stride);
    pairs.resize(rows * stride, MaybeUninit::uninit());
    let one = |(x, pairs): (&[f32], &mut [MaybeUninit<u32>])| isa.dispatch(RoundRow { x, pairs });
    if parallel {
        x.par_chunks(cols).zip(pairs.par_chunks_mut(stride)).with_min_len(16).for_each(one);
    } else {
        x.chunks(cols).zip(pairs.chunks_mut(stride)).for_each(one);
    }
    pairs
}

struct RoundValues<'a>(&'a [f32], &'a mut [MaybeUninit<f32>]);

impl SimdOp for RoundValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (&x, rounded) in self.0.iter().zip(self.1) {
            rounded.write(f32::from_bits(round(x)));
        }
    }
}

/// Every value of `x` rounded to bf16, as f32.
pub(super) fn round_values(isa: Isa, x: &[f32], parallel: bool) -> Vec<MaybeUninit<f32>> {
    const CHUNK: usize = 1 << 14;
    let mut rounded = Vec::with_capacity(x.len());
    rounded.resize(x.len(), MaybeUninit::uninit());
    let one = |(x, y): (&[f32], &mut [MaybeUninit<f32>])| isa.dispatch(RoundValues(x, y));
    if parallel {
        x.par_chunks(CHUNK).zip(rounded.par_chunks_mut(CHUNK)).for_each(one);
    } else {
        one((x, &mut rounded));
    }
    rounded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let hostile =
            [0.0, -0.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-45];
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0xff80_0001, 0x7fff_ffff]
            .map(f32::from_bits);
        let sweep = (0..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for x in hostile.into_iter().chain(ties).chain(sweep) {
            let ours = half::bf16::from_bits((round(x) >> 16) as u16);
            let theirs = half::bf16::from_f32(x);
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{x:e}: {ours} {theirs}");
            assert_eq!(round(x) & 0xffff, 0);
        }
    }
}
