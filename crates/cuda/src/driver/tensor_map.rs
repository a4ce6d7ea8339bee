//! Tensor maps: how the copy engine of sm_90 finds a box of a tensor (`cuda/ptx/tensor_copy.h`).

use bytemuck::{Pod, Zeroable};

use super::{DevicePtr, Element};
use crate::{CudaError, Result};

/// Exchange of 16-byte chunks in shared memory, by which rows of a box lie free of bank conflicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Swizzle {
    /// The box lies row after row.
    #[default]
    None,
    /// Rows of 32 bytes.
    Bytes32,
    /// Rows of 64 bytes.
    Bytes64,
    /// Rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Bytes of a row, which the box must be as wide as; 0 without swizzle.
    pub fn span(self) -> u32 {
        match self {
            Swizzle::None => 0,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        }
    }
}

/// A tensor in device memory and the box that one copy moves (cuTensorMapEncodeTiled without interleaving, element strides of
/// 1, zeros outside the tensor).
#[derive(Debug, Clone, Copy)]
pub struct TensorMapSpec<'a> {
    /// The first element; a multiple of 16.
    pub address: DevicePtr,
    /// Its element.
    pub element: Element,
    /// Elements of each of the 2 to 5 dimensions, innermost first.
    pub dims: &'a [u64],
    /// Bytes between neighbours in dimension 1 and further: multiples of 16, one fewer than `dims`.
    pub strides: &'a [u64],
    /// Elements of the box in each dimension, at most 256; a multiple of 16 bytes wide, with a swizzle as wide as that.
    pub box_dims: &'a [u32],
    /// How the box lies in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMapSpec<'_> {
    /// Checks that the counts of dimensions, strides and extents agree; returns the dimensions.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub(super) fn rank(&self) -> Result<usize> {
        let rank = self.dims.len();
        if !(2..=5).contains(&rank) || self.strides.len() + 1 != rank || self.box_dims.len() != rank {
            return Err(CudaError::shape(
                "tensor_map",
                format!(
                    "{rank} dimensions, {} strides, {} extents of the box; 2 to 5, one fewer, as many are possible",
                    self.strides.len(),
                    self.box_dims.len()
                ),
            ));
        }
        Ok(rank)
    }
}

/// An encoded tensor map, to be put into a parameter block: opaque, and valid for the driver that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);
