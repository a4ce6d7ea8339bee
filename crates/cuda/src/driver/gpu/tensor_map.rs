//! Tensor maps by cuTensorMapEncodeTiled.

use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType_enum as DataType, CUtensorMapFloatOOBfill_enum as Fill,
    CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
    CUtensorMapSwizzle_enum as RawSwizzle,
};

use super::status::check;
use crate::Result;
use crate::driver::{Element, Swizzle, TensorMap, TensorMapSpec};

/// Most dimensions of a tensor map.
const MOST_DIMS: usize = 5;

/// Encodes `spec`: no interleaving, element strides of 1, zeros outside the tensor, whole lines fetched into L2.
///
/// # Errors
/// Counts that disagree; what the driver refuses.
pub(super) fn encode(spec: &TensorMapSpec<'_>) -> Result<TensorMap> {
    let rank = spec.rank()?;
    let kind = match spec.element {
        Element::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Element::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Element::E4m3 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        Element::U32 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
    };
    let swizzle = match spec.swizzle {
        Swizzle::None => RawSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => RawSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => RawSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => RawSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let element_strides = [1u32; MOST_DIMS];
    // The driver's type may ask for a stricter alignment than parameter blocks have.
    let mut raw = MaybeUninit::<CUtensorMap>::zeroed();
    // SAFETY: the driver fills `raw`; the arrays have `rank` entries (the strides one fewer, as the driver reads), at most
    // `MOST_DIMS`.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            raw.as_mut_ptr(),
            kind,
            rank as u32,
            spec.address.0 as *mut _,
            spec.dims.as_ptr(),
            spec.strides.as_ptr(),
            spec.box_dims.as_ptr(),
            element_strides.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", result)?;
    // SAFETY: as large, every byte was set, and any words are a `TensorMap`.
    Ok(unsafe { raw.as_ptr().cast::<TensorMap>().read() })
}

const _: () = assert!(size_of::<TensorMap>() == size_of::<CUtensorMap>());
const _: () = assert!(align_of::<TensorMap>() <= align_of::<CUtensorMap>());
