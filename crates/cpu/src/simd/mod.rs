//! One vector vocabulary for every instruction set: kernels are written once, generic over [`Simd`], and compiled per ISA.
//!
//! A kernel is a [`SimdOp`] whose `run` is `#[inline(always)]`; [`Isa::dispatch`] instantiates it inside a function
//! with the ISA's `#[target_feature]`s, so every intrinsic inlines. A token (`Avx512`, ...) is the proof that
//! the CPU has the features: only `dispatch` makes one, after detection, which is why its methods are safe.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
mod scalar;
#[cfg(test)]
mod tests;

use half::{bf16, f16};

pub use isa::{ISA_VARIABLE, Isa, SimdOp, UnknownIsa};

/// Vectors of `LANES` f32 values, and of `LANES` pairs of bf16 values.
///
/// Every element-wise operation rounds like IEEE binary32 in every implementation, so results differ between ISAs only
/// through fused or unfused `mul_add` (the portable implementation may not fuse), the order of a reduction, and
/// [`Simd::dot_pairs`].
///
/// # Safety
/// `F32` and `Pairs` must be plain data of exactly `LANES` 32-bit lanes, and the `*_ptr` methods must touch no byte
/// beyond the `LANES` elements that they document.
pub unsafe trait Simd: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// f32 values in a vector: 16 or 8.
    const LANES: usize;
    /// A vector of f32.
    type F32: Copy;
    /// A vector of pairs of bf16; the first of a pair is the low half of its 32-bit lane.
    type Pairs: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32;
    /// `LANES` values from `p`, at any alignment.
    ///
    /// # Safety
    /// `p` must be readable for `LANES` elements.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F32;
    /// `LANES` bf16 values from `p`, widened exactly.
    ///
    /// # Safety
    /// `p` must be readable for `LANES` elements.
    unsafe fn load_bf16_ptr(self, p: *const bf16) -> Self::F32;
    /// `LANES` f16 values from `p`, widened exactly (subnormals, infinities and NaN included).
    ///
    /// # Safety
    /// `p` must be readable for `LANES` elements.
    unsafe fn load_f16_ptr(self, p: *const f16) -> Self::F32;
    /// `LANES` pairs from `p`.
    ///
    /// # Safety
    /// `p` must be readable for `LANES` elements.
    unsafe fn load_pairs_ptr(self, p: *const u32) -> Self::Pairs;
    /// Writes `LANES` values to `p`, at any alignment.
    ///
    /// # Safety
    /// `p` must be writable for `LANES` elements.
    unsafe fn store_ptr(self, v: Self::F32, p: *mut f32);
    /// Asks the memory system for the line at `p`. Any address is allowed.
    fn prefetch(self, p: *const u8);
    /// As [`Simd::prefetch`], but no nearer than the second-level cache.
    fn prefetch_l2(self, p: *const u8);

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, fused where the ISA can.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The greater of two lanes; `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The lesser of two lanes; `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even, for `|v| < 2^22`.
    fn round(self, v: Self::F32) -> Self::F32;
    /// `2^n` for integral `n` in `-126..=127`.
    fn exp2_int(self, n: Self::F32) -> Self::F32;
    /// Whether any lane of `a` exceeds that of `b`; a NaN exceeds nothing.
    fn any_greater(self, a: Self::F32, b: Self::F32) -> bool;
    /// `v * 2^n` for integral `n` in `-126..=127`; tiny results may be flushed.
    #[inline(always)]
    fn scale_exp2(self, v: Self::F32, n: Self::F32) -> Self::F32 {
        self.mul(v, self.exp2_int(n))
    }
    /// Sum of all lanes, as a balanced tree over halves.
    fn reduce_add(self, v: Self::F32) -> f32;
    /// Greatest lane. Unspecified (NaN or a lane) when a lane is NaN.
    fn reduce_max(self, v: Self::F32) -> f32;

    /// All lanes the same pair.
    fn splat_pair(self, pair: u32) -> Self::Pairs;
    /// The first value of every pair, widened.
    fn first(self, v: Self::Pairs) -> Self::F32;
    /// The second value of every pair, widened.
    fn second(self, v: Self::Pairs) -> Self::F32;
    /// `acc + a.0 * b.0 + a.1 * b.1` per lane. With AVX512-BF16 this is `vdpbf16ps`, which flushes subnormals and adds
    /// the second product first; elsewhere it is two `mul_add`s.
    #[inline(always)]
    fn dot_pairs(self, acc: Self::F32, a: Self::Pairs, b: Self::Pairs) -> Self::F32 {
        let acc = self.mul_add(self.first(a), self.first(b), acc);
        self.mul_add(self.second(a), self.second(b), acc)
    }

    /// Rounds `low` then `high` to bf16 (nearest, ties to even) and writes them to the front of `p` as `LANES` pairs of
    /// neighbours. Subnormals may be flushed.
    ///
    /// # Panics
    /// When `p` is shorter than `LANES`.
    #[inline(always)]
    fn store_pairs(self, low: Self::F32, high: Self::F32, p: &mut [u32]) {
        let mut values = [0.0; 32];
        self.store(low, &mut values);
        self.store(high, &mut values[Self::LANES..]);
        for (pair, [a, b]) in p[..Self::LANES].iter_mut().zip(values.as_chunks::<2>().0) {
            *pair = crate::linear::pair(*a, *b);
        }
    }

    /// `LANES` values from the front of `s`.
    ///
    /// # Panics
    /// When `s` is shorter, as slice indexing does.
    #[inline(always)]
    fn load(self, s: &[f32]) -> Self::F32 {
        // SAFETY: the subslice holds `LANES` elements.
        unsafe { self.load_ptr(s[..Self::LANES].as_ptr()) }
    }

    /// `LANES` bf16 values from the front of `s`, widened.
    ///
    /// # Panics
    /// When `s` is shorter.
    #[inline(always)]
    fn load_bf16(self, s: &[bf16]) -> Self::F32 {
        // SAFETY: the subslice holds `LANES` elements.
        unsafe { self.load_bf16_ptr(s[..Self::LANES].as_ptr()) }
    }

    /// `LANES` f16 values from the front of `s`, widened.
    ///
    /// # Panics
    /// When `s` is shorter.
    #[inline(always)]
    fn load_f16(self, s: &[f16]) -> Self::F32 {
        // SAFETY: the subslice holds `LANES` elements.
        unsafe { self.load_f16_ptr(s[..Self::LANES].as_ptr()) }
    }

    /// `LANES` bf16 pairs from the front of `s`.
    ///
    /// # Panics
    /// When `s` is shorter.
    #[inline(always)]
    fn load_pairs(self, s: &[u32]) -> Self::Pairs {
        // SAFETY: the subslice holds `LANES` elements.
        unsafe { self.load_pairs_ptr(s[..Self::LANES].as_ptr()) }
    }

    /// Up to `LANES` values from the front of `s`; missing lanes are `fill`.
    #[inline(always)]
    fn load_partial(self, s: &[f32], fill: f32) -> Self::F32 {
        let mut lanes = [fill; 16];
        let n = s.len().min(Self::LANES);
        lanes[..n].copy_from_slice(&s[..n]);
        self.load(&lanes)
    }

    /// Writes `LANES` values to the front of `s`.
    ///
    /// # Panics
    /// When `s` is shorter.
    #[inline(always)]
    fn store(self, v: Self::F32, s: &mut [f32]) {
        // SAFETY: the subslice holds `LANES` elements.
        unsafe { self.store_ptr(v, s[..Self::LANES].as_mut_ptr()) }
    }

    /// Writes the first `min(LANES, s.len())` lanes to `s`.
    #[inline(always)]
    fn store_partial(self, v: Self::F32, s: &mut [f32]) {
        let mut lanes = [0.0; 16];
        self.store(v, &mut lanes);
        let n = s.len().min(Self::LANES);
        s[..n].copy_from_slice(&lanes[..n]);
    }

    /// `e^v` within 2 ulp: `-inf` and anything below `-104` give 0, anything above `88.73` gives infinity, NaN stays NaN;
    /// subnormal results are kept.
    ///
    /// Range reduction of Cody and Waite, polynomial of Cephes `expf`.
    #[inline(always)]
    fn exp(self, v: Self::F32) -> Self::F32 {
        // The bound comes first: `max` and `min` return their second operand when it is NaN.
        let v = self.min(self.splat(89.0), self.max(self.splat(-104.0), v));
        let n = self.round(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        let r = self.mul_add(n, self.splat(-0.693_359_4), v);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let p = self.mul_add(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        // Two factors, since 2^n alone overflows at n = 128 and is subnormal below -126.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(p, self.exp2_int(half)), self.exp2_int(self.sub(n, half)))
    }

    /// `v / (1 + e^-v)` (SiLU, the swish of the gated MLP).
    #[inline(always)]
    fn silu(self, v: Self::F32) -> Self::F32 {
        let e = self.exp(self.sub(self.splat(0.0), v));
        self.div(v, self.add(self.splat(1.0), e))
    }
}
