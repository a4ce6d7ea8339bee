//! The CUDA device of Longhaul: our kernels behind [`longhaul_backend::Backend`].
//!
//! The kernels live in `cuda/` and are launched by name with a typed parameter block. A [`driver::Driver`] runs them: the
//! emulated one on the CPU, so that every line of this crate is tested without a GPU.

pub mod arena;
mod backend;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod context;
pub mod driver;
mod error;
pub mod group;
pub mod kv;
pub mod ops;
pub mod rope;
mod sizes;
pub mod step;
mod tensor;
pub mod weights;

pub use backend::{Cuda, StepBytes, describe};
pub use context::{Context, Kernel, KernelInfo, Variant};
pub use error::{CudaError, Result};
pub use sizes::Limits;
pub use tensor::{Tensor, padded_cols};
pub use weights::matrix_bytes;

/// The kernel registry: every kernel that this crate launches, and with feature `conformance` those that its tests do.
pub fn kernels() -> Vec<KernelInfo> {
    let kernels = ops::kernels().copied();
    #[cfg(feature = "conformance")]
    let kernels = kernels.chain(conformance::KERNELS);
    kernels.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use driver::Emulated;

    /// The registry and the device code agree on names and sizes of parameter blocks, in both directions.
    #[test]
    fn registry_and_device_code_agree() {
        let mut ours: Vec<(String, u64)> =
            kernels().iter().map(|k| (k.name.to_owned(), k.params_bytes as u64)).collect();
        let mut theirs: Vec<(String, u64)> =
            Emulated::kernels().into_iter().map(|k| (k.name, k.params_bytes)).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs);
    }
}
