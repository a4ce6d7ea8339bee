//! The interface between whatever holds weights and the model that loads them.

use longhaul_backend::HostTensor;

use crate::{Result, Slice};

/// A tensor that the model needs: its published name and full (unsharded) shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Dimensions, outermost first; linear weights are `[out_features, in_features]`.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A spec from a name and a shape.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into() }
    }
}

/// A place that tensors are loaded from, whole or in slices.
///
/// All methods take `&self`, and the implementations here are `Sync`: ranks load in parallel from one source.
pub trait TensorSource {
    /// The tensor `name`, or the part of it that `slice` names, in host memory.
    ///
    /// Only the bytes of the slice are read (or generated) and held.
    ///
    /// # Errors
    /// [`crate::WeightsError`] when the name is unknown, the slice does not fit the shape, or reading fails.
    fn tensor(&self, name: &str, slice: Slice) -> Result<HostTensor<'_>>;

    /// Bytes of all expected tensors together, each counted once and whole.
    fn total_bytes(&self) -> u64;

    /// What tells this source from another, short of its data: one line a tensor, in the order of their names.
    fn inventory(&self) -> Vec<String>;

    /// Bytes of tensor data read (or generated) so far, over all threads; headers do not count.
    fn bytes_read(&self) -> u64;
}
