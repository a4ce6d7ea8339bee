//! Row-wise ops: residual add with RMSNorm, weighted sums.

use longhaul_backend::{Error, Result};
use rayon::prelude::*;

use crate::simd::{Isa, Simd, SimdOp};

/// Values below which a second thread costs more than it saves.
const SERIAL_VALUES: usize = 1 << 15;

/// Runs `f(row)` for every row of `out`, on the pool when there is enough to do.
pub(crate) fn for_rows(out: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if cols == 0 {
        return;
    }
    if out.len() < SERIAL_VALUES {
        out.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| f(row, out));
    } else {
        let rows = SERIAL_VALUES.div_ceil(4 * cols).max(1);
        out.par_chunks_mut(rows * cols).enumerate().for_each(|(chunk, out)| {
            for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                f(chunk * rows + row, out);
            }
        });
    }
}

/// `residual + x` (or `x`), and its RMS norm times `weight`: `(normed, sum)`.
pub(crate) fn add_rms_norm(
    isa: Isa,
    x: &[f32],
    residual: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let cols = weight.len();
    if cols == 0 || !x.len().is_multiple_of(cols) || residual.is_some_and(|r| r.len() != x.len()) {
        return Err(Error::shape(
            "add_rms_norm",
            format!("x has {} values, residual {:?}, weight {cols}", x.len(), residual.map(<[f32]>::len)),
        ));
    }
    let mut sum = x.to_vec();
    if let Some(residual) = residual {
        for_rows(&mut sum, cols, |row, sum| {
            for (s, r) in sum.iter_mut().zip(&residual[row * cols..]) {
                *s += r;
            }
        });
    }
    let mut normed = vec![0.0; x.len()];
    for_rows(&mut normed, cols, |row, out| {
        isa.dispatch(RmsNorm { x: &sum[row * cols..][..cols], weight, eps, out });
    });
    Ok((normed, sum))
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl SimdOp for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut squares = [s.splat(0.0); 4];
        for (at, chunk) in self.x.chunks(S::LANES).enumerate() {
            let v = s.load_partial(chunk, 0.0);
            squares[at % 4] = s.mul_add(v, v, squares[at % 4]);
        }
        let total = s.add(s.add(squares[0], squares[1]), s.add(squares[2], squares[3]));
        let mean = s.reduce_add(total) / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), w) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * scale * w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_matches_f64_on_every_isa() {
        for isa in Isa::available() {
            for cols in [1, 3, 15, 16, 17, 64, 896] {
                let rows = 5;
                let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 13.0;
                let x: Vec<f32> = (0..rows * cols).map(value).collect();
                let r: Vec<f32> = (0..rows * cols).map(|i| value(i + 7)).collect();
                let w: Vec<f32> = (0..cols).map(|i| value(i + 3)).collect();
                let (normed, sum) = add_rms_norm(isa, &x, Some(&r), &w, 1e-6).unwrap();
                for row in 0..rows {
                    let s: Vec<f64> =
                        (0..cols).map(|c| f64::from(x[row * cols + c] + r[row * cols + c])).collect();
                    let mean = s.iter().map(|v| v * v).sum::<f64>() / cols as f64;
                    for c in 0..cols {
                        let expected = s[c] / (mean + 1e-6).sqrt() * f64::from(w[c]);
                        let got = f64::from(normed[row * cols + c]);
                        assert!((got - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{isa} {cols}");
                        assert_eq!(f64::from(sum[row * cols + c]), s[c]);
                    }
                }
            }
        }
    }

    #[test]
    fn shapes_are_checked() {
        assert!(add_rms_norm(Isa::Scalar, &[1.0; 5], None, &[1.0; 2], 1e-6).is_err());
        assert!(add_rms_norm(Isa::Scalar, &[1.0; 4], Some(&[1.0; 2]), &[1.0; 2], 1e-6).is_err());
    }
}
