//! Bias, rotation and cache write (`cuda/rope/rope_and_cache.cu`).

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::kv::{KvCache, KvParams};
use crate::rope::{Rope, RopeParams};
use crate::step::Step;
use crate::tensor::Tensor;
use crate::weights::Vector;
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RopeAndCacheParams {
    step: DevicePtr,
    qkv: DevicePtr,
    bias: DevicePtr,
    q: DevicePtr,
    rope: RopeParams,
    kv: KvParams,
    qkv_stride: u32,
    q_stride: u32,
}

const BF16_BF16: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_bf16_bf16");
const BF16_E4M3: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_bf16_e4m3");
const BF16_F32: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_bf16_f32");
const F32_BF16: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_f32_bf16");
const F32_E4M3: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_f32_e4m3");
const F32_F32: Kernel<RopeAndCacheParams> = Kernel::new("rope_and_cache_f32_f32");

const THREADS: u32 = 128;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] =
    &[BF16_BF16.info(), BF16_E4M3.info(), BF16_F32.info(), F32_BF16.info(), F32_E4M3.info(), F32_F32.info()];

/// Adds `bias` to `qkv` (`[rows, (query_heads + 2 * kv_heads) * head_dim]`), writes the rotated k and v to their blocks and
/// returns the unrotated q, `[rows, query_heads * head_dim]`.
///
/// # Errors
/// Shapes that do not fit, a position beyond the tables, or no room in the arena.
pub fn rope_and_cache(
    ctx: &Context,
    qkv: &Tensor,
    bias: Option<&Vector>,
    rope: &Rope,
    step: &Step,
    kv: &KvCache,
    layer: usize,
) -> Result<Tensor> {
    const OP: &str = "rope_and_cache";
    let layout = kv.layout();
    let heads = layout.query_heads + 2 * layout.kv_heads;
    let cols = heads * layout.head_dim;
    let bias_fits = bias.is_none_or(|b| b.len == cols);
    if qkv.cols != cols || qkv.rows != step.rows() || !bias_fits || layer >= layout.layers {
        return Err(CudaError::shape(
            OP,
            format!(
                "qkv [{}, {}], bias {:?}, layer {layer} for {layout:?}, {} rows",
                qkv.rows,
                qkv.cols,
                bias.map(|b| b.len),
                step.rows()
            ),
        ));
    }
    rope.check(step, layout.head_dim, OP)?;
    let q = ctx.tensor(OP, qkv.rows, layout.query_heads * layout.head_dim, qkv.element)?;
    if qkv.rows == 0 || cols == 0 {
        return Ok(q);
    }
    let kernel = match (qkv.element, kv.element()) {
        (Element::Bf16, Element::Bf16) => BF16_BF16,
        (Element::Bf16, Element::E4m3) => BF16_E4M3,
        (Element::Bf16, Element::F32) => BF16_F32,
        (Element::F32, Element::Bf16) => F32_BF16,
        (Element::F32, Element::E4m3) => F32_E4M3,
        (Element::F32, Element::F32) => F32_F32,
        (x, cache) => return Err(CudaError::Unsupported(format!("{OP}: {x:?} into a cache of {cache:?}"))),
    };
    let params = RopeAndCacheParams {
        step: step.address(),
        qkv: qkv.address(),
        bias: bias.map_or(DevicePtr::NULL, Vector::address),
        q: q.address(),
        rope: rope.params,
        kv: kv.layer(layer),
        qkv_stride: qkv.stride as u32,
        q_stride: q.stride as u32,
    };
    // A thread takes eight neighbours of a q or v head, or of the first half of a k head and their partners.
    let width = if layout.head_dim.is_multiple_of(16) { 8 } else { 1 };
    let groups = (cols - layout.kv_heads * layout.head_dim / 2) / width;
    let grid = [qkv.rows as u32, groups.div_ceil(THREADS as usize) as u32, 1];
    ctx.launch(&kernel, Geometry::grid(grid, THREADS), params)?;
    Ok(q)
}
