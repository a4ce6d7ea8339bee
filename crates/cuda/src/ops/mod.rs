//! The ops of the backend: one module a kernel family, each a typed launch of kernels in `cuda/`.

pub mod norm;

use crate::context::KernelInfo;

/// Every kernel of this crate, by family.
pub(crate) fn kernels() -> impl Iterator<Item = &'static KernelInfo> {
    [norm::KERNELS].into_iter().flatten()
}
