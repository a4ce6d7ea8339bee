//! Makes the fake driver run kernels on the emulator, in the process that calls it.

use std::ffi::{CString, c_char, c_int, c_long, c_void};

use libloading::Library;

type Launch = unsafe extern "C" fn(*const c_void, *mut c_char, usize) -> c_int;
type Allocate = unsafe extern "C" fn(*const c_char, u64) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);

// SAFETY: the signatures mirror cuda/emulator/interface.h.
unsafe extern "C" {
    fn longhaul_emulated_launch_kernel(launch: *const c_void, error: *mut c_char, bytes: usize) -> c_int;
    fn longhaul_emulated_allocate(label: *const c_char, bytes: u64) -> *mut c_void;
    fn longhaul_emulated_free(memory: *mut c_void);
}

/// The fake driver, loaded.
pub struct Fake(Library);

impl Fake {
    /// Loads the fake driver, names the kernels of this crate to it and hands it the emulator.
    pub fn with_emulator() -> Self {
        // SAFETY: the library is ours; its initialisers do nothing.
        let library = unsafe { Library::new("libcuda.so.1") }.unwrap();
        // SAFETY: the signatures are those of tests/fake_cuda/cuda.cpp.
        unsafe {
            let add =
                library.get::<unsafe extern "C" fn(*const c_char, usize)>(b"fake_cuda_add_kernel").unwrap();
            for kernel in longhaul_cuda::kernels() {
                add(CString::new(kernel.name).unwrap().as_ptr(), kernel.params_bytes);
            }
            let hand = library.get::<unsafe extern "C" fn(Launch, Allocate, Free)>(b"fake_cuda_use_emulator");
            hand.unwrap()(
                longhaul_emulated_launch_kernel,
                longhaul_emulated_allocate,
                longhaul_emulated_free,
            );
        }
        Self(library)
    }

    /// Allocations and handles that nobody has given back.
    pub fn live(&self) -> c_long {
        // SAFETY: as above.
        unsafe { self.0.get::<unsafe extern "C" fn() -> c_long>(b"fake_cuda_live").unwrap()() }
    }

    /// Operations that are queued and have not run.
    #[allow(dead_code)] // not every test program asks
    pub fn pending(&self) -> c_long {
        // SAFETY: as above.
        unsafe { self.0.get::<unsafe extern "C" fn() -> c_long>(b"fake_cuda_pending").unwrap()() }
    }

    /// Waits for the stream behind the driver's back, which spoils a recording.
    #[allow(dead_code)] // not every test program asks
    pub fn wait_unasked(&self) -> c_int {
        // SAFETY: as above; the fake has one stream whatever the handle.
        unsafe {
            let wait = self.0.get::<unsafe extern "C" fn(*mut c_void) -> c_int>(b"cuStreamSynchronize");
            wait.unwrap()(std::ptr::null_mut())
        }
    }
}
