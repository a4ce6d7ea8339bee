//! Activations: candle-core tensors of f32, `[rows, cols]`, contiguous.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use longhaul_backend::{Error, Result};

fn device_error(op: &'static str) -> impl Fn(candle_core::Error) -> Error {
    move |e| Error::Device { op, message: e.to_string() }
}

/// A tensor of `rows` rows from its values.
pub(crate) fn from_rows(op: &'static str, values: Vec<f32>, rows: usize) -> Result<Tensor> {
    let cols = values.len() / rows.max(1);
    Tensor::from_vec(values, (rows, cols), &Device::Cpu).map_err(device_error(op))
}

/// `(rows, cols)`.
pub(crate) fn dims(op: &'static str, x: &Tensor) -> Result<(usize, usize)> {
    x.dims2().map_err(device_error(op))
}

/// Calls `f` with the tensor's values, row-major.
pub(crate) fn with_values<R>(op: &'static str, x: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        return Err(Error::shape(op, "expected an f32 tensor in host memory"));
    };
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::shape(op, format!("{:?} is not contiguous", layout.shape())))?;
    f(values.get(start..end).ok_or_else(|| Error::shape(op, "the storage is shorter than its layout"))?)
}
