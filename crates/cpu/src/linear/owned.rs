//! The linear ops with results of their own: a vector that is written once instead of zeroed and written.

use std::mem::MaybeUninit;

use longhaul_backend::Result;

use super::Gemm;
use crate::matrix::Matrix;

impl Gemm {
    /// [`Gemm::linear`] into a new vector `[m, out]`.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    pub fn linear_vec(&self, x: &[f32], m: usize, weight: &Matrix, bias: Option<&[f32]>) -> Result<Vec<f32>> {
        filled(m * weight.rows(), |out| self.linear_uninit(x, m, weight, bias, out))
    }

    /// [`Gemm::linear_silu_mul`] into a new vector `[m, out / 2]`.
    ///
    /// # Errors
    /// As [`Gemm::linear_silu_mul`].
    pub fn linear_silu_mul_vec(&self, x: &[f32], m: usize, weight: &Matrix) -> Result<Vec<f32>> {
        filled(m * weight.rows() / 2, |out| self.linear_silu_mul_uninit(x, m, weight, out))
    }
}

fn filled(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<()>) -> Result<Vec<f32>> {
    let mut out: Vec<f32> = Vec::with_capacity(len);
    write(&mut out.spare_capacity_mut()[..len])?;
    // SAFETY: the capacity is at least `len`, and `write` initialises all `len` elements when it succeeds.
    unsafe { out.set_len(len) };
    Ok(out)
}
