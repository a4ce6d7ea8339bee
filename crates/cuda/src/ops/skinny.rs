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
const TILE_ROWS: usize = 128;
const K_BLOCK: usize = 64;
/// Rows of x, and stages of the ring, of each instance.
const INSTANCES: [(usize, usize); 4] = [(8, 4), (16, 4), (32, 4), (64, 3)];
/// Most thread blocks of a multiprocessor: more would only cut tiles into more parts.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;
/// Static shared memory of a block: a word, but the dynamic part begins at a multiple of 1024.
const STATIC_SHARED: usize = 1024;
/// Work units (128 weight rows, 64 of k: 16 KiB) below which a further block costs more than it brings.
const LEAST_UNITS: usize = 2;

/// Whether these kernels take the product, which is not empty, on this device.
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
    if x.rows == 0 {
        return Ok(());
    }
    let index = INSTANCES.iter().position(|(tokens, _)| x.rows <= *tokens).unwrap_or(INSTANCES.len() - 1);
    let ring = |(tokens, stages): (usize, usize)| stages * (TILE_ROWS + tokens) * K_BLOCK * 2;
    let units = tiles * x.cols.div_ceil(K_BLOCK);
    // The same for all instances, from the largest: how k is cut must not depend on the number of rows.
    let properties = ctx.driver.properties();
    let largest = INSTANCES.into_iter().map(ring).max().unwrap_or(0);
    let resident = properties.resident_blocks(largest + STATIC_SHARED).min(BLOCKS_PER_MULTIPROCESSOR);
    let blocks = units.div_ceil(LEAST_UNITS).min((properties.multiprocessors * resident) as usize).max(1);
    let partials = ctx.tensor("linear", blocks * 2, THREADS * INSTANCES[index].0, Element::F32)?;
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
    let geometry = Geometry::linear(blocks, THREADS as u32).shared(ring(INSTANCES[index]));
    ctx.launch(&kernels[index], geometry, params)
}
