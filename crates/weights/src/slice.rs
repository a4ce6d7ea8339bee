//! Which part of a tensor a shard needs, and where that part lies in the row-major original.

use std::fmt;
use std::ops::Range;

use crate::{Result, WeightsError};

/// The part of a tensor that a rank needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slice {
    /// The whole tensor.
    All,
    /// A range of dimension 0 (rows of a matrix, elements of a vector): contiguous in the file.
    Rows(Range<usize>),
    /// A range of dimension 1 of a matrix: one piece per row in the file.
    Cols(Range<usize>),
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slice::All => f.write_str("the whole tensor"),
            Slice::Rows(r) => write!(f, "rows {}..{}", r.start, r.end),
            Slice::Cols(r) => write!(f, "columns {}..{}", r.start, r.end),
        }
    }
}

/// A [`Slice`] checked against a shape. All figures count elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Region {
    /// Shape of the part.
    pub shape: Vec<usize>,
    /// First element of the first piece.
    pub start: usize,
    /// Elements of one piece.
    pub piece: usize,
    /// Number of pieces; 1 for a contiguous part.
    pub pieces: usize,
    /// Distance between the starts of two pieces; meaningless when `pieces` is 1.
    pub stride: usize,
}

impl Slice {
    /// Checks this slice against the `shape` of tensor `name` and finds its pieces.
    pub(crate) fn resolve(&self, name: &str, shape: &[usize]) -> Result<Region> {
        let refuse = |problem: &'static str| WeightsError::Slice {
            tensor: name.to_owned(),
            slice: self.clone(),
            shape: shape.to_vec(),
            problem,
        };
        let product = |dims: &[usize]| {
            let n = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            n.ok_or_else(|| refuse("the element count overflows"))
        };
        let total = product(shape)?;
        let contiguous =
            |shape: Vec<usize>, start, piece| Region { shape, start, piece, pieces: 1, stride: piece };
        match self {
            Slice::All => Ok(contiguous(shape.to_vec(), 0, total)),
            Slice::Rows(range) => {
                let Some((&rows, inner)) = shape.split_first() else {
                    return Err(refuse("a scalar has no rows"));
                };
                let count = checked_len(range, rows).ok_or_else(|| refuse("the range leaves dimension 0"))?;
                let inner_len = product(inner)?;
                let part = std::iter::once(count).chain(inner.iter().copied()).collect();
                // Both products are at most `total` because the range lies inside dimension 0.
                Ok(contiguous(part, range.start * inner_len, count * inner_len))
            }
            Slice::Cols(range) => {
                let &[rows, cols] = shape else {
                    return Err(refuse("only a matrix can be cut by columns"));
                };
                let count = checked_len(range, cols).ok_or_else(|| refuse("the range leaves dimension 1"))?;
                let shape = vec![rows, count];
                Ok(if count == cols {
                    contiguous(shape, 0, total)
                } else {
                    Region { shape, start: range.start, piece: count, pieces: rows, stride: cols }
                })
            }
        }
    }
}

/// Length of `range` if it lies inside `0..bound` and is not reversed.
fn checked_len(range: &Range<usize>, bound: usize) -> Option<usize> {
    (range.end <= bound).then(|| range.end.checked_sub(range.start)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The elements a region covers, in order: compared with slicing a counted array by hand.
    fn indices(region: &Region) -> Vec<usize> {
        (0..region.pieces)
            .flat_map(|p| (0..region.piece).map(move |i| region.start + p * region.stride + i))
            .collect()
    }

    #[test]
    fn regions_cover_exactly_the_slice() {
        let (rows, cols) = (5, 7);
        for start in 0..=rows {
            for end in start..=rows {
                let region = Slice::Rows(start..end).resolve("w", &[rows, cols]).unwrap();
                assert_eq!(region.shape, [end - start, cols]);
                assert_eq!(indices(&region), (start * cols..end * cols).collect::<Vec<_>>());
            }
        }
        for start in 0..=cols {
            for end in start..=cols {
                let region = Slice::Cols(start..end).resolve("w", &[rows, cols]).unwrap();
                let expected: Vec<usize> =
                    (0..rows).flat_map(|r| (start..end).map(move |c| r * cols + c)).collect();
                assert_eq!(region.shape, [rows, end - start]);
                assert_eq!(indices(&region), expected);
            }
        }
        assert_eq!(indices(&Slice::Rows(2..4).resolve("b", &[6]).unwrap()), [2, 3]);
        assert_eq!(Slice::All.resolve("s", &[]).unwrap().piece, 1);
    }

    #[test]
    #[allow(clippy::reversed_empty_ranges)]
    fn slices_outside_the_tensor_are_refused() {
        let cases: [(Slice, &[usize]); 8] = [
            (Slice::Rows(0..6), &[5, 7]),
            (Slice::Rows(4..3), &[5, 7]),
            (Slice::Rows(9..9), &[5, 7]),
            (Slice::Cols(0..8), &[5, 7]),
            (Slice::Cols(5..2), &[5, 7]),
            (Slice::Cols(0..1), &[5]),
            (Slice::Rows(0..0), &[]),
            (Slice::All, &[usize::MAX, 2]),
        ];
        for (slice, shape) in cases {
            let message = slice.resolve("model.w", shape).unwrap_err().to_string();
            assert!(message.contains("model.w"), "{message}");
            assert!(message.contains(&format!("{shape:?}")), "{message}");
        }
    }
}
