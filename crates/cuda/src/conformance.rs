//! Kernels that test the wrappers of PTX instructions (`cuda/conformance`), for `tests/conformance.rs`: no part of a product.

use bytemuck::{Pod, Zeroable};

use crate::context::{Kernel, KernelInfo};
use crate::driver::{DevicePtr, TensorMap};

/// Parameters of most kernels; what the members mean is each kernel's own.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Params {
    /// First input.
    pub a: DevicePtr,
    /// Second input.
    pub b: DevicePtr,
    /// Output.
    pub out: DevicePtr,
    /// Which instruction.
    pub mode: u32,
    /// How much.
    pub count: u32,
}

/// Parameters of the copies of boxes.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct TensorParams {
    /// The tensor.
    pub map: TensorMap,
    /// The box as it lies in shared memory.
    pub raw: DevicePtr,
    /// Coordinates of the box, innermost first.
    pub at: [i32; 5],
    /// Dimensions.
    pub rank: u32,
    /// Bytes of the box.
    pub bytes: u32,
    /// 1: with a cache policy.
    pub mode: u32,
    /// Unused.
    pub reserved: [u32; 6],
}

/// Parameters of the cluster kernel.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct ClusterParams {
    /// u32 `[2, 64]` in boxes of one row.
    pub map: TensorMap,
    /// 256 words a block.
    pub out: DevicePtr,
    /// Unused.
    pub reserved: [u32; 14],
}

/// One kernel a group of instructions.
pub mod kernel {
    #![allow(missing_docs)] // each is described where it is defined
    use super::{ClusterParams, Kernel, Params, TensorParams};

    pub const MMA: Kernel<Params> = Kernel::new("conformance_mma");
    pub const LDMATRIX: Kernel<Params> = Kernel::new("conformance_ldmatrix");
    pub const STMATRIX: Kernel<Params> = Kernel::new("conformance_stmatrix");
    pub const CP_ASYNC: Kernel<Params> = Kernel::new("conformance_cp_async");
    pub const BULK_COPY: Kernel<Params> = Kernel::new("conformance_bulk_copy");
    pub const TENSOR_LOAD: Kernel<TensorParams> = Kernel::new("conformance_tensor_load");
    pub const TENSOR_STORE: Kernel<TensorParams> = Kernel::new("conformance_tensor_store");
    pub const CONVERT: Kernel<Params> = Kernel::new("conformance_convert");
    pub const SHUFFLE: Kernel<Params> = Kernel::new("conformance_shuffle");
    pub const HINTS: Kernel<Params> = Kernel::new("conformance_hints");
    pub const ATOMICS: Kernel<Params> = Kernel::new("conformance_atomics");
    pub const GRIDDEPCONTROL: Kernel<Params> = Kernel::new("conformance_griddepcontrol");
    pub const SETMAXNREG: Kernel<Params> = Kernel::new("conformance_setmaxnreg");
    pub const CLUSTER: Kernel<ClusterParams> = Kernel::new("conformance_cluster");
    /// bf16 products by their number of columns.
    pub const WGMMA_BF16: [(usize, Kernel<Params>); 8] = [
        (8, Kernel::new("conformance_wgmma_bf16_n8")),
        (16, Kernel::new("conformance_wgmma_bf16_n16")),
        (32, Kernel::new("conformance_wgmma_bf16_n32")),
        (64, Kernel::new("conformance_wgmma_bf16_n64")),
        (96, Kernel::new("conformance_wgmma_bf16_n96")),
        (128, Kernel::new("conformance_wgmma_bf16_n128")),
        (192, Kernel::new("conformance_wgmma_bf16_n192")),
        (256, Kernel::new("conformance_wgmma_bf16_n256")),
    ];
    pub const WGMMA_F16: Kernel<Params> = Kernel::new("conformance_wgmma_f16_n64");
    pub const WGMMA_E4M3: Kernel<Params> = Kernel::new("conformance_wgmma_e4m3_n64");
}

/// Every kernel of this module.
pub const KERNELS: [KernelInfo; 24] = [
    kernel::MMA.info(),
    kernel::LDMATRIX.info(),
    kernel::STMATRIX.info(),
    kernel::CP_ASYNC.info(),
    kernel::BULK_COPY.info(),
    kernel::TENSOR_LOAD.info(),
    kernel::TENSOR_STORE.info(),
    kernel::CONVERT.info(),
    kernel::SHUFFLE.info(),
    kernel::HINTS.info(),
    kernel::ATOMICS.info(),
    kernel::GRIDDEPCONTROL.info(),
    kernel::SETMAXNREG.info(),
    kernel::CLUSTER.info(),
    kernel::WGMMA_BF16[0].1.info(),
    kernel::WGMMA_BF16[1].1.info(),
    kernel::WGMMA_BF16[2].1.info(),
    kernel::WGMMA_BF16[3].1.info(),
    kernel::WGMMA_BF16[4].1.info(),
    kernel::WGMMA_BF16[5].1.info(),
    kernel::WGMMA_BF16[6].1.info(),
    kernel::WGMMA_BF16[7].1.info(),
    kernel::WGMMA_F16.info(),
    kernel::WGMMA_E4M3.info(),
];
