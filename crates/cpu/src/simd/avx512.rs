//! 16 lanes with AVX-512 (F, BW, DQ, VL), and `vdpbf16ps` when `BF16`.
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// The proof that the CPU has AVX-512 F, BW, DQ and VL, AVX2 and FMA, and with `BF16` also AVX512-BF16.
#[derive(Debug, Clone, Copy)]
pub struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// # Safety
    /// The CPU must have the features above.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY: both vector types are 16 lanes of 32 bits; loads and stores move exactly one vector.
unsafe impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    type F32 = __m512;
    type Pairs = __m512i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the token proves AVX-512; the caller grants 16 readable elements.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_bf16_ptr(self, p: *const bf16) -> __m512 {
        // SAFETY: the token proves AVX-512; the caller grants 16 readable elements (32 bytes).
        unsafe {
            let halves = _mm256_loadu_si256(p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16_ptr(self, p: *const f16) -> __m512 {
        // SAFETY: the token proves AVX-512; the caller grants 16 readable elements (32 bytes).
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_pairs_ptr(self, p: *const u32) -> __m512i {
        // SAFETY: the token proves AVX-512; the caller grants 16 readable elements.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, v: __m512, p: *mut f32) {
        // SAFETY: the token proves AVX-512; the caller grants 16 writable elements.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    fn prefetch_l2(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn any_greater(self, a: __m512, b: __m512) -> bool {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0 }
    }

    #[inline(always)]
    fn scale_exp2(self, v: __m512, n: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_scalef_ps(v, n) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }

    #[inline(always)]
    fn exp2_int(self, n: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn reduce_add(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    fn reduce_max(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> __m512i {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_set1_epi32(pair as i32) }
    }

    #[inline(always)]
    fn first(self, v: __m512i) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)) }
    }

    #[inline(always)]
    fn second(self, v: __m512i) -> __m512 {
        // SAFETY: the token proves AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32))) }
    }

    #[inline(always)]
    fn store_pairs(self, low: __m512, high: __m512, p: &mut [u32]) {
        let p = &mut p[..16];
        if BF16 {
            // SAFETY: `BF16` proves AVX512-BF16; `p` holds 16 words.
            unsafe {
                let pairs = _mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_si512(p.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
            }
        } else {
            let mut values = [0.0; 32];
            self.store(low, &mut values);
            self.store(high, &mut values[16..]);
            for (pair, [a, b]) in p.iter_mut().zip(values.as_chunks::<2>().0) {
                *pair = crate::linear::pair(*a, *b);
            }
        }
    }

    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        if BF16 {
            // SAFETY: `BF16` proves AVX512-BF16; `__m512i` and `__m512bh` are the same 64 bytes.
            unsafe {
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b),
                )
            }
        } else {
            let acc = self.mul_add(self.first(a), self.first(b), acc);
            self.mul_add(self.second(a), self.second(b), acc)
        }
    }
}
