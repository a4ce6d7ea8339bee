//! The gated activation of an MLP (`cuda/activation/silu_and_mul.cu`).

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::tensor::Tensor;
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SiluAndMulParams {
    gate_up: DevicePtr,
    out: DevicePtr,
    n: u32,
    in_stride: u32,
    out_stride: u32,
    reserved: u32,
}

const BF16: Kernel<SiluAndMulParams> = Kernel::new("silu_and_mul_bf16");
const F32: Kernel<SiluAndMulParams> = Kernel::new("silu_and_mul_f32");
/// Eight columns each.
const THREADS: u32 = 128;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[BF16.info(), F32.info()];

/// `silu(gate) * up` of `[rows, 2 * n]` (gate columns, then up columns): `[rows, n]`.
///
/// # Errors
/// An odd number of columns, or no room in the arena.
pub fn silu_and_mul(ctx: &Context, gate_up: &Tensor) -> Result<Tensor> {
    const OP: &str = "silu_and_mul";
    if !gate_up.cols.is_multiple_of(2) {
        return Err(CudaError::shape(OP, format!("{} columns are not two halves", gate_up.cols)));
    }
    let n = gate_up.cols / 2;
    let out = ctx.tensor(OP, gate_up.rows, n, gate_up.element)?;
    if gate_up.rows == 0 || n == 0 {
        return Ok(out);
    }
    let params = SiluAndMulParams {
        gate_up: gate_up.address(),
        out: out.address(),
        n: n as u32,
        in_stride: gate_up.stride as u32,
        out_stride: out.stride as u32,
        reserved: 0,
    };
    let grid = [gate_up.rows as u32, (n as u32).div_ceil(8 * THREADS), 1];
    let kernel = if gate_up.element == Element::F32 { F32 } else { BF16 };
    ctx.launch(&kernel, Geometry::grid(grid, THREADS), params)?;
    Ok(out)
}
