//! The emulator's C interface (`cuda/emulator/interface.h`).

use std::ffi::{c_char, c_int, c_void};

pub use linked::*;

#[repr(C)]
pub struct RawLaunch {
    pub kernel: *const c_char,
    pub params: *const c_void,
    pub params_bytes: u64,
    pub seed: u64,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub eager: u32,
    pub resident_blocks: u32,
    pub across_devices: u32,
}

#[derive(Default)]
#[repr(C)]
pub struct RawTensor {
    pub address: u64,
    pub dims: [u64; 5],
    pub strides: [u64; 5],
    pub box_dims: [u32; 5],
    pub rank: u32,
    pub element_bytes: u32,
    pub swizzle: u32,
}

#[cfg(longhaul_emulator)]
mod linked {
    use super::{RawLaunch, RawTensor, c_char, c_int, c_void};

    // SAFETY: the signatures mirror cuda/emulator/interface.h.
    unsafe extern "C" {
        pub fn longhaul_emulated_launch_kernel(
            launch: *const RawLaunch,
            error: *mut c_char,
            error_bytes: usize,
        ) -> c_int;
        pub fn longhaul_emulated_allocate(label: *const c_char, bytes: u64) -> *mut c_void;
        pub fn longhaul_emulated_free(memory: *mut c_void);
        pub fn longhaul_emulated_tensor_map(
            tensor: *const RawTensor,
            words: *mut u64,
            error: *mut c_char,
            error_bytes: usize,
        ) -> c_int;
        pub fn longhaul_emulated_kernel(
            index: usize,
            name: *mut *const c_char,
            params_bytes: *mut u64,
            max_threads: *mut u32,
        ) -> c_int;
    }
}

#[cfg(not(longhaul_emulator))]
mod linked {
    //! A build without a C++ compiler: [`crate::driver::Emulated::new`] fails, so nothing here is reached.
    use super::{RawLaunch, RawTensor, c_char, c_int, c_void};

    pub unsafe fn longhaul_emulated_tensor_map(
        _: *const RawTensor,
        _: *mut u64,
        _: *mut c_char,
        _: usize,
    ) -> c_int {
        1
    }
    pub unsafe fn longhaul_emulated_launch_kernel(_: *const RawLaunch, _: *mut c_char, _: usize) -> c_int {
        1
    }
    pub unsafe fn longhaul_emulated_allocate(_: *const c_char, _: u64) -> *mut c_void {
        std::ptr::null_mut()
    }
    pub unsafe fn longhaul_emulated_free(_: *mut c_void) {}
    pub unsafe fn longhaul_emulated_kernel(
        _: usize,
        _: *mut *const c_char,
        _: *mut u64,
        _: *mut u32,
    ) -> c_int {
        0
    }
}
