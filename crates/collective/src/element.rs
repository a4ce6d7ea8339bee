//! Elements in 32-bit words, and their sums.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use half::{bf16, f16};

/// An element type. The accesses are relaxed: an exchange orders them.
pub trait Element: Copy + Default {
    /// What sums are taken in.
    type Sum: Copy + Default;
    /// Elements of one word.
    const PER_WORD: usize;
    /// Tells the types apart in the description of a call.
    const CODE: u32;

    fn to_bits(self) -> u32;
    /// From the lowest bits.
    fn from_bits(bits: u32) -> Self;
    fn widen(self) -> Self::Sum;
    fn add(sum: Self::Sum, value: Self) -> Self::Sum;
    fn narrow(sum: Self::Sum) -> Self;
}

impl Element for f32 {
    type Sum = f32;
    const PER_WORD: usize = 1;
    const CODE: u32 = 1;

    fn to_bits(self) -> u32 {
        f32::to_bits(self)
    }
    fn from_bits(bits: u32) -> Self {
        f32::from_bits(bits)
    }
    fn widen(self) -> f32 {
        self
    }
    fn add(sum: f32, value: Self) -> f32 {
        sum + value
    }
    fn narrow(sum: f32) -> Self {
        sum
    }
}

impl Element for i32 {
    type Sum = i32;
    const PER_WORD: usize = 1;
    const CODE: u32 = 2;

    fn to_bits(self) -> u32 {
        self.cast_unsigned()
    }
    fn from_bits(bits: u32) -> Self {
        bits.cast_signed()
    }
    fn widen(self) -> i32 {
        self
    }
    fn add(sum: i32, value: Self) -> i32 {
        sum.wrapping_add(value)
    }
    fn narrow(sum: i32) -> Self {
        sum
    }
}

macro_rules! sixteen_bits {
    ($element:ty, $code:literal) => {
        impl Element for $element {
            type Sum = f32;
            const PER_WORD: usize = 2;
            const CODE: u32 = $code;

            fn to_bits(self) -> u32 {
                <$element>::to_bits(self).into()
            }
            fn from_bits(bits: u32) -> Self {
                <$element>::from_bits(bits as u16)
            }
            fn widen(self) -> f32 {
                self.to_f32()
            }
            fn add(sum: f32, value: Self) -> f32 {
                sum + value.to_f32()
            }
            fn narrow(sum: f32) -> Self {
                <$element>::from_f32(sum)
            }
        }
    };
}
sixteen_bits!(bf16, 3);
sixteen_bits!(f16, 4);

/// Writes `values` from the start of `slot`.
pub fn store<E: Element>(slot: &[AtomicU32], values: &[E]) {
    for (word, part) in slot.iter().zip(values.chunks(E::PER_WORD)) {
        let bits = part.iter().rev().fold(0u32, |bits, &value| {
            bits.checked_shl(32 / E::PER_WORD as u32).unwrap_or(0) | value.to_bits()
        });
        word.store(bits, Relaxed);
    }
}

/// Elements `from..` of `slot`, without end.
fn elements<E: Element>(slot: &[AtomicU32], from: usize) -> impl Iterator<Item = E> {
    let per_word = E::PER_WORD;
    slot.iter()
        .skip(from / per_word)
        .flat_map(move |word| {
            let bits = word.load(Relaxed);
            (0..per_word).map(move |i| E::from_bits(bits >> (i * 32 / per_word)))
        })
        .skip(from % per_word)
}

/// Reads `out.len()` elements from element `from` of `slot`.
pub fn load<E: Element>(slot: &[AtomicU32], from: usize, out: &mut [E]) {
    for (out, value) in out.iter_mut().zip(elements(slot, from)) {
        *out = value;
    }
}

/// Sums `out.len()` elements from element `from` of all slots, in the order of the slots, with one rounding at the end.
pub fn sum<'a, E: Element>(slots: impl Iterator<Item = &'a [AtomicU32]> + Clone, from: usize, out: &mut [E]) {
    const BLOCK: usize = 256;
    let mut sums = [E::Sum::default(); BLOCK];
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let from = from + block * BLOCK;
        let sums = &mut sums[..out.len()];
        for (rank, slot) in slots.clone().enumerate() {
            let values = elements::<E>(slot, from);
            if rank == 0 {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = value.widen());
            } else {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = E::add(*sum, value));
            }
        }
        out.iter_mut().zip(&*sums).for_each(|(out, &sum)| *out = E::narrow(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(count: usize) -> Vec<AtomicU32> {
        (0..count).map(|_| AtomicU32::new(0)).collect()
    }

    #[test]
    fn odd_offsets_and_lengths_of_16_bit_elements() {
        let values: Vec<bf16> = (0..7).map(|i| bf16::from_f32(i as f32)).collect();
        let slot = words(4);
        store(&slot, &values);
        for from in 0..7 {
            let mut out = vec![bf16::ZERO; 7 - from];
            load(&slot, from, &mut out);
            assert_eq!(out, values[from..]);
        }
    }

    #[test]
    fn a_16_bit_sum_is_rounded_once() {
        // 256 + 1 + 1 is 258 in f32; rounding to bf16 (8 bits) after each addition would stay at 256.
        let slots: Vec<_> = [256.0, 1.0, 1.0]
            .map(|v| {
                let slot = words(1);
                store(&slot, &[bf16::from_f32(v)]);
                slot
            })
            .into();
        let mut out = [bf16::ZERO];
        sum(slots.iter().map(Vec::as_slice), 0, &mut out);
        assert_eq!(out[0].to_f32(), 258.0);
    }
}
