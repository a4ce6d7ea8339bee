//! Products of few rows: weight streamers (`cuda/gemm/gemm_skinny_mma.cu`).

use bytemuck::{Pod, Zeroable};

use crate::Result;
use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::tensor::Tensor;
use crate::weights::Matrix;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SkinnyParams {
    x: DevicePtr,
    weight: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    partials: DevicePtr,
    counters: DevicePtr,
    rows: u32,
    n: u32,
    k: u32,
    x_stride: u32,
    weight_stride: u32,
    out_stride: u32,
}

type K = Kernel<SkinnyParams>;
const BF16: [K; 4] = [
    K::new("gemm_skinny_mma_8_bf16"),
    K::new("gemm_skinny_mma_16_bf16"),
    K::new("gemm_skinny_mma_32_bf16"),
    K::new("gemm_skinny_mma_64_bf16"),
];
const F32: [K; 4] = [
    K::new("gemm_skinny_mma_8_f32"),
    K::new("gemm_skinny_mma_16_f32"),
    K::new("gemm_skinny_mma_32_f32"),
    K::new("gemm_skinny_mma_64_f32"),
];
const SILU: [K; 4] = [
    K::new("gemm_skinny_silu_mma_8_bf16"),
    K::new("gemm_skinny_silu_mma_16_bf16"),
    K::new("gemm_skinny_silu_mma_32_bf16"),
    K::new("gemm_skinny_silu_mma_64_bf16"),
];

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    BF16[0].info(),
    BF16[1].info(),
    BF16[2].info(),
    BF16[3].info(),
    F32[0].info(),
    F32[1].info(),
    F32[2].info(),
    F32[3].info(),
    SILU[0].info(),
    SILU[1].info(),
    SILU[2].info(),
    SILU[3].info(),
];

/// Rows up to which these kernels serve.
pub(crate) const MOST_ROWS: usize = 64;
const THREADS: usize = 128;
const TILE_ROWS: usize = 64;
const K_BLOCK: usize = 64;
/// Thread blocks of a multiprocessor: what the shared memory of the widest instance allows.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Work units (64 weight rows, 64 of k: 8 KiB) below which a further block costs more than it brings.
const LEAST_UNITS: usize = 4;

/// Whether these kernels take the product on this device.
pub(crate) fn takes(ctx: &Context, x: &Tensor, weight: &Matrix) -> bool {
    ctx.allows_mma()
        && x.rows <= MOST_ROWS
        && x.element == Element::Bf16
        && weight.element == Element::Bf16
        && weight.rows.div_ceil(TILE_ROWS / 2) <= Context::COUNTERS
}

/// `x · weightᵀ + bias` into `out`; shapes have been checked.
pub(crate) fn linear(
    ctx: &Context,
    x: &Tensor,
    weight: &Matrix,
    bias: DevicePtr,
    out: &Tensor,
) -> Result<()> {
    let kernels = if out.element == Element::F32 { F32 } else { BF16 };
    run(ctx, &kernels, x, weight, weight.rows, weight.rows.div_ceil(TILE_ROWS), bias, out)
}

/// The gated product; shapes have been checked.
pub(crate) fn linear_silu_and_mul(ctx: &Context, x: &Tensor, gate_up: &Matrix) -> Result<Tensor> {
    let n = gate_up.rows / 2;
    let out = ctx.tensor("linear_silu_and_mul", x.rows, n, x.element)?;
    run(ctx, &SILU, x, gate_up, n, n.div_ceil(TILE_ROWS / 2), DevicePtr::NULL, &out)?;
    Ok(out)
}

#[allow(clippy::too_many_arguments)] // the operands of one launch
fn run(
    ctx: &Context,
    kernels: &[K; 4],
    x: &Tensor,
    weight: &Matrix,
    n: usize,
    tiles: usize,
    bias: DevicePtr,
    out: &Tensor,
) -> Result<()> {
    let (kernel, tokens, stages) = match x.rows {
        0 => return Ok(()),
        1..=8 => (&kernels[0], 8, 6),
        9..=16 => (&kernels[1], 16, 6),
        17..=32 => (&kernels[2], 32, 5),
        _ => (&kernels[3], 64, 4),
    };
    let units = tiles * x.cols.div_ceil(K_BLOCK);
    if units == 0 {
        return ctx.driver.fill(out.address(), 0, out.rows * out.stride * out.element.size());
    }
    let most = ctx.driver.properties().multiprocessors as usize * BLOCKS_PER_MULTIPROCESSOR;
    let blocks = units.div_ceil(LEAST_UNITS).min(most).max(1);
    let accumulators = tokens / 2;
    let partials = ctx.tensor("linear", blocks * 2, THREADS * accumulators, Element::F32)?;
    let params = SkinnyParams {
        x: x.address(),
        weight: weight.address(),
        bias,
        out: out.address(),
        partials: partials.address(),
        counters: ctx.counters(),
        rows: x.rows as u32,
        n: n as u32,
        k: x.cols as u32,
        x_stride: x.stride as u32,
        weight_stride: weight.stride as u32,
        out_stride: out.stride as u32,
    };
    let ring = stages * (TILE_ROWS + tokens) * K_BLOCK * 2;
    let out_tile = tokens * (TILE_ROWS + 4) * 4;
    ctx.launch(kernel, Geometry::linear(blocks, THREADS as u32).shared(ring + out_tile), params)
}
