//! Columns, rows and experts: counted things that can be cut at any multiple of a unit.

use std::ops::Range;

/// Cuts `0..total` into `ranks` consecutive ranges at multiples of `unit` whose sizes differ by at most one unit; the last
/// unit may be short.
///
/// The larger shares go to the last ranks: the last one has the short unit, and the first ones have the larger shares of
/// heads ([`super::heads`]).
pub(super) fn deal(total: usize, unit: usize, ranks: usize) -> Vec<Range<usize>> {
    let units = total.div_ceil(unit);
    let smaller = ranks - units % ranks;
    let mut start = 0;
    (0..ranks)
        .map(|rank| {
            let share = units / ranks + usize::from(rank >= smaller);
            let range = start.min(total)..(start + share * unit).min(total);
            start += share * unit;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_shares() {
        let lengths = |total, unit, ranks| -> Vec<usize> {
            deal(total, unit, ranks).iter().map(ExactSizeIterator::len).collect()
        };
        // 29568 = 231 · 128
        assert_eq!(lengths(29568, 128, 8), [28, 29, 29, 29, 29, 29, 29, 29].map(|units| units * 128));
        assert_eq!(lengths(64, 1, 3), [21, 21, 22]);
        assert_eq!(lengths(264, 16, 4), [64, 64, 64, 72]);
        assert_eq!(lengths(96, 16, 8), [0, 0, 16, 16, 16, 16, 16, 16]);
        assert_eq!(lengths(0, 16, 2), [0, 0]);
    }
}
