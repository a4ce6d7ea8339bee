//! Residual add and RMSNorm (`cuda/norm/add_rms_norm.cu`).

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::tensor::Tensor;
use crate::weights::Vector;
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AddRmsNormParams {
    x: DevicePtr,
    residual: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    residual_out: DevicePtr,
    cols: u32,
    x_stride: u32,
    residual_stride: u32,
    out_stride: u32,
    eps: f32,
    reserved: u32,
}

type K = Kernel<AddRmsNormParams>;
const BF16_BF16: K = K::new("add_rms_norm_bf16_bf16");
const F32_BF16: K = K::new("add_rms_norm_f32_bf16");
const F32_F32: K = K::new("add_rms_norm_f32_f32");
const THREADS: u32 = 256;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[BF16_BF16.info(), F32_BF16.info(), F32_F32.info()];

/// `residual += x` (or `= x`), `normed = residual / rms(residual) * weight`: `(normed, residual)`, the residual in f32,
/// what is normed in the context's element. x is of that element (an embedding) or f32 (what a layer adds). A
/// given residual is updated in place: the returned one shares its memory.
///
/// # Errors
/// Shapes that do not fit, or no room in the arena.
pub fn add_rms_norm(
    ctx: &Context,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Vector,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "add_rms_norm";
    let fits = residual.is_none_or(|r| (r.rows, r.cols, r.element) == (x.rows, x.cols, Element::F32));
    if !fits || weight.len != x.cols {
        return Err(CudaError::shape(
            OP,
            format!(
                "x [{}, {}], residual {:?}, weight [{}]",
                x.rows,
                x.cols,
                residual.map(|r| (r.rows, r.cols, r.element)),
                weight.len
            ),
        ));
    }
    let out = ctx.tensor(OP, x.rows, x.cols, ctx.element)?;
    let residual_out = match residual {
        Some(r) => r.clone(),
        None => ctx.tensor(OP, x.rows, x.cols, Element::F32)?,
    };
    let params = AddRmsNormParams {
        x: x.address(),
        residual: Context::optional(residual),
        weight: weight.address(),
        out: out.address(),
        residual_out: residual_out.address(),
        cols: x.cols as u32,
        x_stride: x.stride as u32,
        residual_stride: residual_out.stride as u32,
        out_stride: out.stride as u32,
        eps,
        reserved: 0,
    };
    let kernel = match (x.element, ctx.element) {
        (Element::Bf16, Element::Bf16) => BF16_BF16,
        (Element::F32, Element::Bf16) => F32_BF16,
        (Element::F32, Element::F32) => F32_F32,
        (from, to) => return Err(CudaError::Unsupported(format!("{OP}: {from:?} to {to:?}"))),
    };
    // Eight columns a thread.
    let threads = (x.cols.div_ceil(8) as u32).next_multiple_of(32).clamp(32, THREADS);
    ctx.launch(&kernel, Geometry::linear(x.rows, threads), params)?;
    Ok((out, residual_out))
}
