//! The linear op on packed weights: `out = x · weightᵀ + bias`.
//!
//! Work is cut into tasks of one group of panels by some rows, which rayon spreads; inside a task the weights go by in
//! blocks that stay in cache while all rows pass over them. Results do not depend on the cut, since every output is one
//! chain of multiply-adds over `in`.
#![allow(unsafe_code)]

mod gate;
mod kernel;
mod owned;
mod round;
mod task;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use longhaul_backend::{DType, Error, Result};

use crate::matrix::{Matrix, PANEL};
use crate::simd::{Isa, UnknownIsa};
use gate::SiluMul;
use kernel::{DotBf16, PlainF32, WideBf16, WideF16};
pub(crate) use round::{pair, round};
use task::{Job, Shared};

/// What the products are computed in. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Weights widened exactly, activations f32, fused multiply-add.
    #[default]
    F32,
    /// Activations rounded to bf16 once, products exact: bf16 dot products where the CPU has them (twice the speed),
    /// else the same products by f32 multiply-adds. Weights that are not bf16 fall back to [`Precision::F32`].
    Bf16,
}

/// Multiply-adds below which waking another thread costs more than it saves.
const SERIAL_WORK: usize = 1 << 17;

/// The linear op for one ISA and precision. Uses the current rayon pool; cheapest when called from inside it.
///
/// The result of a row is the same bits whatever the other rows, their number, and the number of threads. It may differ
/// between ISAs and precisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemm {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Precision of the products.
    pub precision: Precision,
}

impl Gemm {
    /// The op on this process's ISA ([`Isa::active`]).
    ///
    /// # Errors
    /// The environment names an ISA that this CPU lacks.
    pub fn new(precision: Precision) -> std::result::Result<Self, UnknownIsa> {
        Ok(Self { isa: Isa::active()?, precision })
    }

    /// `out = x · weightᵀ + bias` for `x` `[m, in]`, `weight` `[out, in]`, `bias` `[out]`, `out` `[m, out]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length does not fit.
    pub fn linear(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        self.linear_uninit(x, m, weight, bias, as_uninit(out))
    }

    /// [`Gemm::linear`] into memory that need not be initialised; all of it is on success.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    pub fn linear_uninit(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
        check("linear", [("x", x.len(), m, cols), ("out", out.len(), m, rows)])?;
        if let Some(bias) = bias {
            check("linear", [("bias", bias.len(), 1, rows)])?;
        }
        self.run(x, m, weight, bias, out, false);
        Ok(())
    }

    /// The gated half of an MLP: `out = silu(x · gateᵀ) * (x · upᵀ)` for `weight` = gate rows stacked on up rows
    /// (`[2 n, in]`) and `out` `[m, n]`, without the `[m, 2 n]` in between.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length does not fit or the weight has an odd number of rows.
    pub fn linear_silu_mul(&self, x: &[f32], m: usize, weight: &Matrix, out: &mut [f32]) -> Result<()> {
        self.linear_silu_mul_uninit(x, m, weight, as_uninit(out))
    }

    /// [`Gemm::linear_silu_mul`] into memory that need not be initialised; all of it is on success.
    ///
    /// # Errors
    /// As [`Gemm::linear_silu_mul`].
    pub fn linear_silu_mul_uninit(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
        if rows % 2 != 0 {
            return Err(Error::shape(
                "linear_silu_mul",
                format!("{weight:?}: gate and up need an even number of rows"),
            ));
        }
        check("linear_silu_mul", [("x", x.len(), m, cols), ("out", out.len(), m, rows / 2)])?;
        if (rows / 2).is_multiple_of(PANEL) {
            self.run(x, m, weight, None, out, true);
            return Ok(());
        }
        // The halves do not begin at a panel: compute them side by side first.
        let mut both = vec![MaybeUninit::uninit(); m * rows];
        self.run(x, m, weight, None, &mut both, false);
        let (gates, ups) = (both.as_ptr().cast::<f32>(), both.as_ptr().wrapping_add(rows / 2).cast());
        let op = SiluMul {
            gates,
            ups,
            stride: rows,
            rows: m,
            cols: rows / 2,
            out: out.as_mut_ptr().cast(),
            out_stride: rows / 2,
        };
        // SAFETY: `run` has written all of `both`, `[m, rows]`; `out` holds `[m, rows / 2]`.
        unsafe { op.run(self.isa) };
        Ok(())
    }

    fn run(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [MaybeUninit<f32>],
        gated: bool,
    ) {
        if m == 0 {
            return;
        }
        let cols = weight.cols();
        if weight.rows() == 0 {
            return;
        }
        if cols == 0 {
            // Empty sums; `silu(0) * 0` is 0 as well.
            for row in out.chunks_exact_mut(out.len() / m) {
                for (n, value) in row.iter_mut().enumerate() {
                    value.write(bias.and_then(|bias| bias.get(n)).copied().unwrap_or(0.0));
                }
            }
            return;
        }
        let parallel = m * cols * weight.rows() >= SERIAL_WORK && rayon::current_num_threads() > 1;
        let job = Job { isa: self.isa, weight, bias, rows: m, gated, parallel };
        let out = Shared(out.as_mut_ptr().cast());
        match (weight.dtype(), self.precision) {
            (DType::BF16, Precision::Bf16) if self.isa == Isa::Avx512Bf16 => {
                let stride = spread(cols.div_ceil(2));
                let pairs = round::round_rows(self.isa, x, cols, stride, parallel);
                job.run::<DotBf16>((pairs.as_ptr().cast(), stride), (weight.steps(), false), out);
            }
            (DType::BF16, Precision::Bf16) => {
                // Products of bf16 values are exact in f32, so rounding the activations is all there is to do.
                let x = round::round_values(self.isa, x, parallel);
                job.run::<WideBf16>((x.as_ptr().cast(), cols), (cols / 2, cols % 2 == 1), out);
            }
            (DType::BF16, Precision::F32) => {
                job.run::<WideBf16>((x.as_ptr(), cols), (cols / 2, cols % 2 == 1), out)
            }
            (DType::F16, _) => job.run::<WideF16>((x.as_ptr(), cols), (cols, false), out),
            (DType::F32, _) => job.run::<PlainF32>((x.as_ptr(), cols), (cols, false), out),
            (DType::F8E4M3, _) => debug_assert!(false, "`Matrix::pack` refuses float8"),
        }
    }
}

/// A row stride of at least `words` whose rows do not fall on the same L1 sets.
fn spread(words: usize) -> usize {
    let words = words.next_multiple_of(16);
    if words.is_multiple_of(256) { words + 16 } else { words }
}

fn check<const N: usize>(op: &'static str, lengths: [(&str, usize, usize, usize); N]) -> Result<()> {
    for (name, found, rows, cols) in lengths {
        if rows.checked_mul(cols) != Some(found) {
            return Err(Error::shape(op, format!("{name} holds {found} values, expected [{rows}, {cols}]")));
        }
    }
    Ok(())
}

fn as_uninit(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: same layout; private, and every caller only writes initialised values through it.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}
