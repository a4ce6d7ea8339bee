//! Status codes of the CUDA driver as this crate's errors.

use std::ffi::{CStr, c_char};

use cudarc::driver::sys::{self, CUresult};

use crate::{CudaError, Result};

/// A status code of the driver that is not success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub u32);

impl Status {
    pub const OUT_OF_MEMORY: Status = Status(2);
    pub const STUB_LIBRARY: Status = Status(34);
    pub const NO_DEVICE: Status = Status(100);
    pub const INVALID_IMAGE: Status = Status(200);
    pub const NO_BINARY_FOR_GPU: Status = Status(209);
    pub const INVALID_PTX: Status = Status(218);
    pub const JIT_COMPILER_NOT_FOUND: Status = Status(221);
    pub const UNSUPPORTED_PTX_VERSION: Status = Status(222);
    pub const NOT_FOUND: Status = Status(500);
    pub const PEER_ACCESS_ALREADY_ENABLED: Status = Status(704);
    pub const TOO_MANY_PEERS: Status = Status(711);
    pub const SYSTEM_NOT_READY: Status = Status(802);
    pub const SYSTEM_DRIVER_MISMATCH: Status = Status(803);

    /// The outcome of a call.
    pub fn of(result: CUresult) -> std::result::Result<(), Status> {
        match result as u32 {
            0 => Ok(()),
            code => Err(Status(code)),
        }
    }

    /// Whether the context is unusable from here on ("… inconsistent state", cuda.h): every later call fails alike.
    pub fn is_sticky(self) -> bool {
        match self.0 {
            // Uncorrectable ECC and NVLink errors, contained errors.
            214 | 220 | 226 => true,
            // Illegal address, launch timeout, context destroyed, device assert.
            700 | 702 | 709 | 710 => true,
            // Hardware stack, illegal instruction, misaligned address, address space, program counter, launch failure,
            // tensor memory leak.
            714..=719 | 721 => true,
            // MPS server or client gone, external device, unknown.
            806 | 810 | 911 | 999 => true,
            _ => false,
        }
    }

    /// The driver's name and description; the number where it has none.
    pub fn describe(self) -> String {
        // A code that this list does not have cannot be an enum value, so the driver is not asked about it.
        match known(self.0) {
            None => format!("CUDA error {}", self.0),
            Some(code) => {
                let text = |f: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
                    let mut text = std::ptr::null();
                    // SAFETY: `text` is a live local; on success it points to a static string of the driver.
                    unsafe {
                        (f(code, &mut text) as u32 == 0 && !text.is_null())
                            .then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
                    }
                };
                match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
                    (Some(name), Some(description)) => format!("{name} ({}): {description}", self.0),
                    (Some(name), None) => format!("{name} ({})", self.0),
                    _ => format!("CUDA error {}", self.0),
                }
            }
        }
    }

    /// The error of `call`, which may be a kernel.
    pub fn error(self, call: &str) -> CudaError {
        if self.is_sticky() {
            CudaError::Fatal { kernel: call.into(), message: self.describe() }
        } else if self == Status::OUT_OF_MEMORY {
            CudaError::OutOfMemory { what: call.into(), bytes: 0, available: 0 }
        } else {
            CudaError::Call { call: call.into(), message: self.describe() }
        }
    }
}

/// The enum value of a code that this build knows and reports by name.
fn known(code: u32) -> Option<CUresult> {
    use CUresult::*;
    [
        CUDA_ERROR_INVALID_VALUE,
        CUDA_ERROR_OUT_OF_MEMORY,
        CUDA_ERROR_NOT_INITIALIZED,
        CUDA_ERROR_DEINITIALIZED,
        CUDA_ERROR_STUB_LIBRARY,
        CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER,
        CUDA_ERROR_DEVICE_UNAVAILABLE,
        CUDA_ERROR_NO_DEVICE,
        CUDA_ERROR_INVALID_DEVICE,
        CUDA_ERROR_DEVICE_NOT_LICENSED,
        CUDA_ERROR_INVALID_IMAGE,
        CUDA_ERROR_INVALID_CONTEXT,
        CUDA_ERROR_NO_BINARY_FOR_GPU,
        CUDA_ERROR_ECC_UNCORRECTABLE,
        CUDA_ERROR_INVALID_PTX,
        CUDA_ERROR_NVLINK_UNCORRECTABLE,
        CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
        CUDA_ERROR_JIT_COMPILATION_DISABLED,
        CUDA_ERROR_CONTAINED,
        CUDA_ERROR_OPERATING_SYSTEM,
        CUDA_ERROR_INVALID_HANDLE,
        CUDA_ERROR_NOT_FOUND,
        CUDA_ERROR_NOT_READY,
        CUDA_ERROR_ILLEGAL_ADDRESS,
        CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        CUDA_ERROR_LAUNCH_TIMEOUT,
        CUDA_ERROR_CONTEXT_IS_DESTROYED,
        CUDA_ERROR_ASSERT,
        CUDA_ERROR_HARDWARE_STACK_ERROR,
        CUDA_ERROR_ILLEGAL_INSTRUCTION,
        CUDA_ERROR_MISALIGNED_ADDRESS,
        CUDA_ERROR_INVALID_ADDRESS_SPACE,
        CUDA_ERROR_INVALID_PC,
        CUDA_ERROR_LAUNCH_FAILED,
        CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
        CUDA_ERROR_NOT_PERMITTED,
        CUDA_ERROR_NOT_SUPPORTED,
        CUDA_ERROR_SYSTEM_NOT_READY,
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
        CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
        CUDA_ERROR_MPS_RPC_FAILURE,
        CUDA_ERROR_MPS_CLIENT_TERMINATED,
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
        CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
        CUDA_ERROR_EXTERNAL_DEVICE,
        CUDA_ERROR_UNKNOWN,
    ]
    .into_iter()
    .find(|known| *known as u32 == code)
}

/// Makes the error of a call by its name: any call may report what an earlier kernel did.
pub(super) type Blame<'a> = &'a dyn Fn(&str, Status) -> CudaError;

/// The outcome of `call`, named in the error.
pub(super) fn check(call: &str, result: CUresult) -> Result<()> {
    Status::of(result).map_err(|status| status.error(call))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_a_context_is_fatal() {
        for code in [214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999] {
            assert!(Status(code).is_sticky(), "{code}");
        }
        for code in [1, 2, 100, 200, 201, 209, 400, 500, 600, 701, 720, 801, 900, 901] {
            assert!(!Status(code).is_sticky(), "{code}");
        }
    }

    #[test]
    fn a_code_of_a_later_driver_has_a_number() {
        assert_eq!(Status(12_345).describe(), "CUDA error 12345");
        assert!(matches!(Status(12_345).error("cuX"), CudaError::Call { .. }));
    }
}
