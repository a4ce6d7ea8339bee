//! The one place that knows whether this build has a GPU driver.

use std::sync::Arc;

use longhaul_cuda::CudaError;
use longhaul_cuda::driver::Driver;

/// Opens the CUDA device of this ordinal.
///
/// # Errors
/// [`CudaError::Unavailable`] with the remedy, or [`CudaError::OutOfMemory`].
#[cfg(feature = "cuda")]
pub(crate) fn open(ordinal: usize) -> Result<Arc<dyn Driver>, CudaError> {
    Ok(Arc::new(longhaul_cuda::driver::Gpu::open(ordinal)?))
}

/// How many CUDA devices the machine has.
///
/// # Errors
/// [`CudaError::Unavailable`] with the remedy where there is none.
#[cfg(feature = "cuda")]
pub(crate) fn count() -> Result<usize, CudaError> {
    Ok(longhaul_cuda::driver::Gpu::probe()?.len())
}

/// Whether the machine has CUDA devices, usable or not.
#[cfg(feature = "cuda")]
pub(crate) fn is_present() -> bool {
    longhaul_cuda::driver::Gpu::is_present()
}

#[cfg(not(feature = "cuda"))]
fn no_driver() -> CudaError {
    CudaError::Unavailable {
        message:
            "this build has no CUDA device; use --device cpu, or build with --features cuda on a machine with \
                  a GPU (README, \"GPU\")"
                .into(),
    }
}

/// This build has none.
#[cfg(not(feature = "cuda"))]
pub(crate) fn open(_ordinal: usize) -> Result<Arc<dyn Driver>, CudaError> {
    Err(no_driver())
}

/// This build has none.
#[cfg(not(feature = "cuda"))]
pub(crate) fn count() -> Result<usize, CudaError> {
    Err(no_driver())
}

/// This build looks for none.
#[cfg(not(feature = "cuda"))]
pub(crate) fn is_present() -> bool {
    false
}
