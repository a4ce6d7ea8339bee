//! Every primitive of every available ISA against f64, or against the exact answer.
use half::{bf16, f16};

use super::*;

struct Exp<'a>(&'a [f32], &'a mut [f32]);

impl SimdOp for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, y) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            s.store_partial(s.exp(s.load_partial(x, 0.0)), y);
        }
    }
}

#[test]
fn exp_is_within_two_ulp_and_saturates() {
    let mut xs: Vec<f32> = (0..400_000).map(|i| -104.0 + i as f32 * (192.7 / 400_000.0)).collect();
    xs.extend((0..1000).map(|i| i as f32 * 1e-6 - 5e-4));
    for isa in Isa::available() {
        let mut ys = vec![f32::NAN; xs.len()];
        isa.dispatch(Exp(&xs, &mut ys));
        for (&x, &y) in xs.iter().zip(&ys) {
            let exact = f64::from(x).exp();
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            assert!((f64::from(y) - exact).abs() <= 2.0 * ulp, "{isa}: exp({x}) = {y:e}, not {exact:e}");
        }
        let limits = [f32::NEG_INFINITY, -1e30, -104.5, 89.0, 1e30, f32::INFINITY, 0.0, f32::NAN];
        let mut ys = [f32::NAN; 8];
        isa.dispatch(Exp(&limits, &mut ys));
        assert_eq!(ys[..7], [0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY, f32::INFINITY, 1.0], "{isa}");
        assert!(ys[7].is_nan(), "{isa}");
    }
}

struct WidenAll<'a>(&'a [u16], &'a mut [f32], &'a mut [f32], &'a mut [f32], &'a mut [f32]);

impl SimdOp for WidenAll<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(bits, b, f, first, second) = self;
        for at in (0..bits.len()).step_by(S::LANES) {
            s.store(s.load_bf16(&bytemuck::cast_slice(bits)[at..]), &mut b[at..]);
            s.store(s.load_f16(&bytemuck::cast_slice(bits)[at..]), &mut f[at..]);
        }
        let pairs: Vec<u32> = bits.chunks(2).map(|p| u32::from(p[0]) | u32::from(p[1]) << 16).collect();
        for at in (0..pairs.len()).step_by(S::LANES) {
            let pair = s.load_pairs(&pairs[at..]);
            s.store(s.first(pair), &mut first[at..]);
            s.store(s.second(pair), &mut second[at..]);
        }
    }
}

#[test]
fn widening_is_exact_for_every_bit_pattern() {
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    for isa in Isa::available() {
        let n = bits.len();
        let mut v = vec![f32::NAN; 3 * n];
        let (b, rest) = v.split_at_mut(n);
        let (f, pairs) = rest.split_at_mut(n);
        let (first, second) = pairs.split_at_mut(n / 2);
        isa.dispatch(WidenAll(&bits, b, f, first, second));
        let same = |x: f32, y: f32| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
        for &i in &bits {
            let at = usize::from(i);
            assert!(same(b[at], bf16::from_bits(i).to_f32()), "{isa}: bf16 {i:#x} is not {}", b[at]);
            assert!(same(f[at], f16::from_bits(i).to_f32()), "{isa}: f16 {i:#x} is not {}", f[at]);
            let half = if i % 2 == 0 { first[at / 2] } else { second[at / 2] };
            assert!(same(half, bf16::from_bits(i).to_f32()), "{isa}: pair at {i:#x} is not {half}");
        }
    }
}

struct Basics;

impl SimdOp for Basics {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let a: Vec<f32> = (0..16).map(|i| i as f32 - 7.5).collect();
        let b: Vec<f32> = (0..16).map(|i| 1.5 * (i * 5 % 16) as f32 - 9.25).collect();
        let (va, vb) = (s.load(&a), s.load(&b));
        let lanes = |v: S::F32| {
            let mut out = [f32::NAN; 17];
            s.store(v, &mut out[1..]);
            out[1..=S::LANES].to_vec()
        };
        let expect = |f: fn(f32, f32) -> f32| {
            a.iter().zip(&b).take(S::LANES).map(|(&x, &y)| f(x, y)).collect::<Vec<_>>()
        };
        assert_eq!(lanes(s.add(va, vb)), expect(|x, y| x + y));
        assert_eq!(lanes(s.sub(va, vb)), expect(|x, y| x - y));
        assert_eq!(lanes(s.mul(va, vb)), expect(|x, y| x * y));
        assert_eq!(lanes(s.div(va, vb)), expect(|x, y| x / y));
        assert_eq!(lanes(s.max(va, vb)), expect(f32::max));
        assert_eq!(lanes(s.min(va, vb)), expect(f32::min));
        assert_eq!(lanes(s.mul_add(va, vb, va)), expect(|x, y| x.mul_add(y, x)));
        assert_eq!(lanes(s.round(va)), expect(|x, _| x.round_ties_even()));
        assert_eq!(lanes(s.exp2_int(s.round(vb))), expect(|_, y| y.round_ties_even().exp2()));
        // Small multiples of 1/4: exact in any order.
        assert_eq!(s.reduce_add(vb), b[..S::LANES].iter().sum::<f32>());
        assert_eq!(s.reduce_max(vb), b[..S::LANES].iter().copied().fold(f32::MIN, f32::max));
        assert_eq!(lanes(s.load_partial(&a[..3], -2.0))[..5], [-7.5, -6.5, -5.5, -2.0, -2.0]);
        let mut part = [f32::NAN; 3];
        s.store_partial(va, &mut part);
        assert_eq!(part, a[..3]);
        // 3 + 2 * 4 + 0.5 * -8, exact in bf16.
        let pair =
            |x, y| u32::from(bf16::from_f32(x).to_bits()) | u32::from(bf16::from_f32(y).to_bits()) << 16;
        let dot = s.dot_pairs(s.splat(3.0), s.splat_pair(pair(2.0, 0.5)), s.splat_pair(pair(4.0, -8.0)));
        assert_eq!(lanes(dot), vec![7.0; S::LANES]);
        for x in [-80.0_f32, -3.0, 0.0, 0.7, 12.0, 60.0] {
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            let found = f64::from(lanes(s.silu(s.splat(x)))[0]);
            assert!(
                (found - exact).abs() <= 4.0 * f64::from(f32::EPSILON) * exact.abs(),
                "silu({x}) = {found:e}"
            );
        }
        assert_eq!(lanes(s.silu(s.splat(-200.0)))[0], 0.0);
        S::LANES
    }
}

#[test]
fn every_isa_agrees_on_the_basics() {
    for isa in Isa::available() {
        let lanes = isa.dispatch(Basics);
        assert_eq!(lanes, if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16) { 16 } else { 8 }, "{isa}");
    }
}
