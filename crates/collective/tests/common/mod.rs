//! Checks of every operation of a rank against float64, for any kind of group.
#![allow(dead_code)] // every test program uses a part

pub mod suite;

use half::{bf16, f16};
use longhaul_backend::{Collective, Values, ValuesMut};

/// Lengths that are empty, odd, and beyond a slot.
pub const LENGTHS: [usize; 5] = [0, 1, 3, 4097, 1_000_000];

/// An element type of the tests.
pub trait Element: Copy + Default + PartialEq + std::fmt::Debug + 'static {
    /// Half the distance of neighbouring values, relative.
    const ROUNDING: f64;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u32;
    fn values(values: &[Self]) -> Values<'_>;
    fn values_mut(values: &mut [Self]) -> ValuesMut<'_>;
}

macro_rules! element {
    ($element:ty, $variant:ident, $rounding:expr, $from:expr, $to:expr, $bits:expr) => {
        impl Element for $element {
            const ROUNDING: f64 = $rounding;
            fn from_f64(value: f64) -> Self {
                $from(value)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn bits(self) -> u32 {
                $bits(self)
            }
            fn values(values: &[Self]) -> Values<'_> {
                Values::$variant(values)
            }
            fn values_mut(values: &mut [Self]) -> ValuesMut<'_> {
                ValuesMut::$variant(values)
            }
        }
    };
}
element!(f32, F32, 1.0 / 16_777_216.0, |v| v as f32, f64::from, f32::to_bits);
element!(bf16, Bf16, 1.0 / 256.0, bf16::from_f64, bf16::to_f64, |v: bf16| u32::from(v.to_bits()));
element!(f16, F16, 1.0 / 2048.0, f16::from_f64, f16::to_f64, |v: f16| u32::from(v.to_bits()));
element!(i32, I32, 0.0, |v: f64| (v * 1e6) as i32, f64::from, i32::cast_unsigned);

/// Element `i` of rank `rank` in round `round`: in `[-1, 1)` (splitmix64).
pub fn value<E: Element>(rank: usize, i: usize, round: usize) -> E {
    let mut z = ((round as u64) << 40 | (rank as u64) << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    E::from_f64(((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
}

fn input<E: Element>(rank: usize, length: usize, round: usize) -> Vec<E> {
    (0..length).map(|i| value(rank, i, round)).collect()
}

#[track_caller]
fn assert_sum<E: Element>(got: &[E], from: usize, world_size: usize, round: usize, what: &str) {
    for (i, got) in got.iter().enumerate() {
        let terms = (0..world_size).map(|rank| value::<E>(rank, from + i, round).to_f64());
        let (exact, magnitude) = terms.fold((0.0, 0.0), |(sum, m), v| (sum + v, m + v.abs()));
        let error = (got.to_f64() - exact).abs();
        // One rounding of the result and, in f32, one for each addition.
        let bound = E::ROUNDING * exact.abs() + f64::from(f32::EPSILON) * world_size as f64 * magnitude;
        let bound = if E::ROUNDING == 0.0 { 0.0 } else { bound };
        assert!(error <= bound, "{what}: element {}: {got:?}, exactly {exact}", from + i);
    }
}

/// Shares that differ: rank r has about r + 1 parts, rank 1 (of more than two) has nothing.
pub fn uneven(length: usize, world_size: usize) -> Vec<usize> {
    let mut counts: Vec<usize> =
        (0..world_size).map(|r| length * (r + 1) / (world_size * (world_size + 1))).collect();
    if world_size > 2 {
        counts[1] = 0;
    }
    let last = world_size - 1;
    counts[last] = 0;
    counts[last] = length - counts.iter().sum::<usize>();
    counts
}

/// FNV-1a over the bits of `values`: equal on all ranks when the bits are.
pub fn fingerprint<E: Element>(values: &[E]) -> u64 {
    values
        .iter()
        .flat_map(|v| v.bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Every operation once with `length` elements; the fingerprint of the sum.
pub fn every_operation<E: Element>(group: &dyn Collective, length: usize, round: usize) -> u64 {
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut values = input::<E>(rank, length, round);
    group.all_reduce(E::values_mut(&mut values)).unwrap();
    assert_sum(&values, 0, world_size, round, "all_reduce");
    let sum = fingerprint(&values);

    let counts = uneven(length, world_size);
    let start: usize = counts[..rank].iter().sum();
    let mut share = vec![E::default(); counts[rank]];
    let whole = input::<E>(rank, length, round);
    group.reduce_scatter(E::values(&whole), &counts, E::values_mut(&mut share)).unwrap();
    assert_eq!(share, values[start..start + counts[rank]], "reduce_scatter differs from all_reduce");

    let own = input::<E>(rank, counts[rank], round);
    let mut gathered = vec![E::default(); length];
    group.all_gather(E::values(&own), &counts, E::values_mut(&mut gathered)).unwrap();
    let expected: Vec<E> =
        counts.iter().enumerate().flat_map(|(rank, &count)| input::<E>(rank, count, round)).collect();
    assert_eq!(gathered, expected, "all_gather");

    for root in [0, world_size - 1] {
        let mut values = input::<E>(rank, length, round + 1);
        group.broadcast(root, E::values_mut(&mut values)).unwrap();
        assert_eq!(values, input::<E>(root, length, round + 1), "broadcast from {root}");
    }
    group.barrier().unwrap();
    sum
}

/// Every operation and type with each of `lengths`; the fingerprints of all sums.
pub fn everything(group: &dyn Collective, lengths: &[usize]) -> Vec<u64> {
    let mut sums = Vec::new();
    for (round, &length) in lengths.iter().enumerate() {
        sums.push(every_operation::<f32>(group, length, round));
        sums.push(every_operation::<bf16>(group, length, round));
        sums.push(every_operation::<f16>(group, length, round));
        sums.push(every_operation::<i32>(group, length, round));
    }
    sums
}
