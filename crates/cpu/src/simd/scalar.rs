//! 8 lanes as plain arrays, for any CPU. Loops over a fixed array are what LLVM turns into NEON or SSE.
use std::array::from_fn;

use half::{bf16, f16};

use super::Simd;

/// Arrays of 8 f32. Needs no CPU feature.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

/// `a * b + c`: fused where that is one instruction, since the library call elsewhere is far slower than rounding twice.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

/// binary16 to binary32 without branches: the exponent is rebased by one exact multiplication, which also normalises
/// subnormals; infinity and NaN keep an exponent of all ones.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | sign)
}

// SAFETY: both vector types are 8 lanes of 32 bits; loads and stores move exactly 8 elements.
unsafe impl Simd for Scalar {
    const LANES: usize = 8;
    type F32 = [f32; 8];
    type Pairs = [u32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> [f32; 8] {
        // SAFETY: the caller grants 8 readable elements.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16_ptr(self, p: *const bf16) -> [f32; 8] {
        // SAFETY: the caller grants 8 readable elements; bf16 is a `u16` in memory.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16_ptr(self, p: *const f16) -> [f32; 8] {
        // SAFETY: the caller grants 8 readable elements; f16 is a `u16` in memory.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(widen_f16)
    }

    #[inline(always)]
    unsafe fn load_pairs_ptr(self, p: *const u32) -> [u32; 8] {
        // SAFETY: the caller grants 8 readable elements.
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_ptr(self, v: [f32; 8], p: *mut f32) {
        // SAFETY: the caller grants 8 writable elements.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn prefetch_l2(self, _: *const u8) {}

    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        from_fn(|i| mul_add(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn any_greater(self, a: [f32; 8], b: [f32; 8]) -> bool {
        a.iter().zip(&b).any(|(a, b)| a > b)
    }

    #[inline(always)]
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, v: [f32; 8]) -> [f32; 8] {
        // Adding 1.5 * 2^23 leaves no bits for a fraction.
        const MAGIC: f32 = 12_582_912.0;
        v.map(|x| (x + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn exp2_int(self, n: [f32; 8]) -> [f32; 8] {
        n.map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn reduce_add(self, v: [f32; 8]) -> f32 {
        let quad: [f32; 4] = from_fn(|i| v[i] + v[i + 4]);
        (quad[0] + quad[2]) + (quad[1] + quad[3])
    }

    #[inline(always)]
    fn reduce_max(self, v: [f32; 8]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn splat_pair(self, pair: u32) -> [u32; 8] {
        [pair; 8]
    }

    #[inline(always)]
    fn first(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f32::from_bits(x << 16))
    }

    #[inline(always)]
    fn second(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f32::from_bits(x & 0xffff_0000))
    }
}
