//! Dense products (`cuda/gemm/`): our kernels for few rows, the vendor's library for many, or our kernel for many where only
//! mma.sync kernels are to run.

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo, Variant};
use crate::driver::{DevicePtr, Element, Gemm, Geometry};
use crate::ops::activation::silu_and_mul;
use crate::ops::skinny;
use crate::tensor::Tensor;
use crate::weights::{Matrix, Vector};
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GemmParams {
    x: DevicePtr,
    weight: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    rows: u32,
    n: u32,
    k: u32,
    x_stride: u32,
    weight_stride: u32,
    out_stride: u32,
}

const PLAIN_BF16: Kernel<GemmParams> = Kernel::new("gemm_plain_bf16");
const PLAIN_BF16_F32: Kernel<GemmParams> = Kernel::new("gemm_plain_bf16_f32");
const PLAIN_F32: Kernel<GemmParams> = Kernel::new("gemm_plain_f32");
const MMA_BF16: Kernel<GemmParams> = Kernel::new("gemm_mma_bf16");
const MMA_F32: Kernel<GemmParams> = Kernel::new("gemm_mma_f32");

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] =
    &[PLAIN_BF16.info(), PLAIN_BF16_F32.info(), PLAIN_F32.info(), MMA_BF16.info(), MMA_F32.info()];

/// Warps of a block of the plain kernel, one output element each.
const PLAIN_WARPS: usize = 8;
/// Most rows in one launch of the plain kernel (grid limit).
const PLAIN_ROWS: usize = 65_535;
/// Rows and columns of a tile of the mma kernel, its threads, and its ring in shared memory.
const MMA_TILE: usize = 128;
const MMA_THREADS: u32 = 128;
const MMA_SHARED: usize = 4 * 2 * MMA_TILE * 64;

/// `x · weightᵀ + bias` in `out`'s element: `[rows, n]`.
///
/// # Errors
/// Shapes or elements that do not fit, or no room in the arena.
pub fn linear(
    ctx: &Context,
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Vector>,
    out: Element,
) -> Result<Tensor> {
    let out = ctx.tensor("linear", x.rows, weight.rows, out)?;
    linear_into(ctx, x, weight, bias, &out)?;
    Ok(out)
}

/// As [`linear`], into a tensor that is there.
///
/// # Errors
/// As [`linear`].
pub fn linear_into(
    ctx: &Context,
    x: &Tensor,
    weight: &Matrix,
    bias: Option<&Vector>,
    out: &Tensor,
) -> Result<()> {
    const OP: &str = "linear";
    let bias_fits = bias.is_none_or(|b| b.len == weight.rows);
    let out_fits = (out.rows, out.cols) == (x.rows, weight.rows);
    if x.cols != weight.cols || x.element != weight.element || !bias_fits || !out_fits {
        return Err(CudaError::shape(
            OP,
            format!(
                "x {:?} [{}, {}], weight {:?} [{}, {}], bias {:?}, out [{}, {}]",
                x.element,
                x.rows,
                x.cols,
                weight.element,
                weight.rows,
                weight.cols,
                bias.map(|b| b.len),
                out.rows,
                out.cols
            ),
        ));
    }
    if x.rows == 0 || weight.rows == 0 {
        return Ok(());
    }
    let bias = bias.map_or(DevicePtr::NULL, Vector::address);
    // A product over nothing is the bias, or zeros, which the plain kernels know without a special case.
    let is_empty = x.cols == 0;
    if !is_empty && skinny::takes(ctx, x, weight) {
        return skinny::linear(ctx, x, weight, bias, out);
    }
    let params = |first: usize, rows: usize| GemmParams {
        x: x.row_address(first),
        weight: weight.address(),
        bias,
        out: out.row_address(first),
        rows: rows as u32,
        n: weight.rows as u32,
        k: x.cols as u32,
        x_stride: x.stride as u32,
        weight_stride: weight.stride as u32,
        out_stride: out.stride as u32,
    };
    let many = x.rows > skinny::MOST_ROWS;
    if !is_empty && ctx.variant == Variant::Auto && many {
        let queued = ctx.driver.gemm(&Gemm {
            x: x.address(),
            x_stride: x.stride,
            weight: weight.address(),
            weight_stride: weight.stride,
            bias,
            out: out.address(),
            out_stride: out.stride,
            m: x.rows,
            n: weight.rows,
            k: x.cols,
            element: x.element,
            out_element: out.element,
        });
        // What the library has no algorithm for, our kernels do.
        if !matches!(queued, Err(CudaError::Unsupported(_))) {
            return queued;
        }
    }
    if !is_empty && (ctx.variant == Variant::Mma || many) && ctx.allows_mma() && x.element == Element::Bf16 {
        let kernel = if out.element == Element::F32 { MMA_F32 } else { MMA_BF16 };
        let tiles = x.rows.div_ceil(MMA_TILE) * weight.rows.div_ceil(MMA_TILE);
        let geometry = Geometry::linear(tiles, MMA_THREADS).shared(MMA_SHARED);
        return ctx.launch(&kernel, geometry, params(0, x.rows));
    }
    let kernel = match (x.element, out.element) {
        (Element::Bf16, Element::Bf16) => PLAIN_BF16,
        (Element::Bf16, Element::F32) => PLAIN_BF16_F32,
        (Element::F32, Element::F32) => PLAIN_F32,
        (from, to) => return Err(CudaError::Unsupported(format!("{OP}: {from:?} to {to:?}"))),
    };
    for first in (0..x.rows).step_by(PLAIN_ROWS) {
        let rows = (x.rows - first).min(PLAIN_ROWS);
        let grid = [weight.rows.div_ceil(PLAIN_WARPS) as u32, rows as u32, 1];
        ctx.launch(&kernel, Geometry::grid(grid, 32 * PLAIN_WARPS as u32), params(first, rows))?;
    }
    Ok(())
}

/// Launches that write `gemm`'s bias to every row of its output: the plain product of no columns. For a library that adds
/// no bias of our type.
#[cfg(feature = "cuda")]
pub(crate) fn bias_rows(gemm: &Gemm) -> impl Iterator<Item = (&'static str, Geometry, Vec<u8>)> {
    let kernel = if gemm.out_element == Element::F32 { PLAIN_F32 } else { PLAIN_BF16 };
    (0..gemm.m).step_by(PLAIN_ROWS).map(move |first| {
        let rows = (gemm.m - first).min(PLAIN_ROWS);
        let params = GemmParams {
            x: gemm.x,
            weight: gemm.weight,
            bias: gemm.bias,
            out: gemm.out.offset(first * gemm.out_stride * gemm.out_element.size()),
            rows: rows as u32,
            n: gemm.n as u32,
            k: 0,
            x_stride: gemm.x_stride as u32,
            weight_stride: gemm.weight_stride as u32,
            out_stride: gemm.out_stride as u32,
        };
        let grid = [gemm.n.div_ceil(PLAIN_WARPS) as u32, rows as u32, 1];
        (kernel.name(), Geometry::grid(grid, 32 * PLAIN_WARPS as u32), bytemuck::bytes_of(&params).to_vec())
    })
}

/// `silu(x · gateᵀ) * (x · upᵀ)` for `gate_up` = gate rows stacked on up rows: `[rows, n]` in x's element.
///
/// # Errors
/// As [`linear`]; an odd number of rows of `gate_up`.
pub fn linear_silu_and_mul(ctx: &Context, x: &Tensor, gate_up: &Matrix) -> Result<Tensor> {
    const OP: &str = "linear_silu_and_mul";
    if !gate_up.rows.is_multiple_of(2) || x.cols != gate_up.cols {
        return Err(CudaError::shape(
            OP,
            format!("x [{}, {}], gate and up [{}, {}]", x.rows, x.cols, gate_up.rows, gate_up.cols),
        ));
    }
    let is_empty = x.cols == 0 || gate_up.rows == 0;
    if !is_empty && x.element == gate_up.element && skinny::takes(ctx, x, gate_up) {
        return skinny::linear_silu_and_mul(ctx, x, gate_up);
    }
    silu_and_mul(ctx, &linear(ctx, x, gate_up, None, x.element)?)
}
