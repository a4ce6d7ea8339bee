//! The ops of the backend: one module a kernel family, each a typed launch of kernels in `cuda/`.

pub mod activation;
pub mod attention;
pub mod comm;
pub mod embedding;
pub mod gemm;
mod grouped;
pub mod kv;
pub mod moe;
pub mod norm;
pub mod rope;
pub mod sampling;
pub mod sampling_slice;
mod skinny;

use crate::context::KernelInfo;

/// Every kernel of this crate, by family.
pub(crate) fn kernels() -> impl Iterator<Item = &'static KernelInfo> {
    [
        activation::KERNELS,
        attention::KERNELS,
        comm::KERNELS,
        embedding::KERNELS,
        gemm::KERNELS,
        grouped::KERNELS,
        kv::KERNELS,
        moe::KERNELS,
        norm::KERNELS,
        rope::KERNELS,
        sampling::KERNELS,
        sampling_slice::KERNELS,
        skinny::KERNELS,
    ]
    .into_iter()
    .flatten()
}
