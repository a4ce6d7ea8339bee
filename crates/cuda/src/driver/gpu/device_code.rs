//! The device code in this binary: fatbins made by the build script, checked and loaded when a device is opened.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule};

use super::context::Stream;
use super::status::{Status, check};
use crate::context::KernelInfo;
use crate::driver::DeviceProperties;
use crate::{CudaError, Result};

/// One source of `cuda/`, compiled.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceCode {
    /// The source, relative to `cuda/`.
    pub source: &'static str,
    /// CRC-32 (IEEE) of `fatbin`.
    pub crc32: u32,
    /// Machine code for each architecture that is supported, and PTX for later ones.
    pub fatbin: &'static [u8],
    /// Entry points.
    pub kernels: &'static [&'static str],
}

/// Bytes where nvcc would put them: fatbins begin at a multiple of 8.
#[repr(C, align(16))]
struct Aligned<const N: usize>([u8; N]);

// Defines `DEVICE_CODE`.
include!(concat!(env!("OUT_DIR"), "/device_code.rs"));

/// The device code of this build.
pub(super) fn device_code() -> &'static [DeviceCode] {
    DEVICE_CODE
}

/// Checks every fatbin against its sum.
///
/// # Errors
/// [`CudaError::Unavailable`] naming the source.
pub(super) fn verify(code: &[DeviceCode]) -> Result<()> {
    for unit in code {
        let found = crc32fast::hash(unit.fatbin);
        if found != unit.crc32 {
            return Err(corrupt(
                unit.source,
                &format!("its sum is {found:08x} instead of {:08x}", unit.crc32),
            ));
        }
    }
    Ok(())
}

fn corrupt(source: &str, what: &str) -> CudaError {
    CudaError::Unavailable {
        message: format!(
            "the device code of {source} in this binary is corrupt ({what}): the file was damaged after it was built; install \
             the longhaul binary again, or use --device cpu"
        ),
    }
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    /// The driver's handle; valid as long as its module is loaded.
    pub raw: CUfunction,
    /// Size of its parameter block.
    pub params_bytes: usize,
}

/// All kernels of the registry, loaded.
pub(super) struct Functions {
    modules: Modules,
    by_name: HashMap<&'static str, Function>,
}

/// Modules that unload themselves.
struct Modules {
    stream: Arc<Stream>,
    raw: Vec<CUmodule>,
}

// SAFETY: CUDA handles may be used from any thread; they are not changed after loading.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

impl Functions {
    /// Loads `code`, which has been verified, and resolves every kernel of `registry`. The context is current.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`]: code that the driver does not take, none for this device, or a kernel that is missing or takes another parameter
    /// block than this crate passes. [`CudaError::OutOfMemory`].
    pub fn load(
        stream: &Arc<Stream>,
        code: &'static [DeviceCode],
        registry: &[KernelInfo],
        properties: &DeviceProperties,
    ) -> Result<Self> {
        let infos: HashMap<&str, &KernelInfo> = registry.iter().map(|info| (info.name, info)).collect();
        let modules = Modules { stream: stream.clone(), raw: Vec::with_capacity(code.len()) };
        let mut this = Self { modules, by_name: HashMap::with_capacity(registry.len()) };
        for unit in code {
            let module = load_module(unit, properties)?;
            this.modules.raw.push(module);
            for &name in unit.kernels {
                // Code of a kernel that this crate does not launch stays unused.
                if let Some(info) = infos.get(name) {
                    this.by_name.insert(name, load_function(module, unit, info, properties)?);
                }
            }
        }
        match registry.iter().find(|info| !this.by_name.contains_key(info.name)) {
            None => Ok(this),
            Some(info) => Err(mismatch(info.name, "is missing")),
        }
    }

    /// The kernel of this name.
    pub fn get(&self, name: &str) -> Option<(&'static str, Function)> {
        self.by_name.get_key_value(name).map(|(&name, &function)| (name, function))
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        for &module in &self.raw {
            // SAFETY: loaded by `Functions::load`; no work refers to it any more.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

/// The code and this crate do not belong together.
fn mismatch(kernel: &str, what: &str) -> CudaError {
    CudaError::Unavailable {
        message: format!(
            "kernel {kernel} {what} in the device code of this binary; build it again from a clean checkout (cargo clean -p \
             longhaul-cuda), or use --device cpu"
        ),
    }
}

fn load_module(unit: &DeviceCode, properties: &DeviceProperties) -> Result<CUmodule> {
    let mut module = std::ptr::null_mut();
    // SAFETY: `module` is a live local; the fatbin states its own length and matches its sum.
    let result = unsafe { sys::cuModuleLoadData(&mut module, unit.fatbin.as_ptr().cast()) };
    Status::of(result).map(|()| module).map_err(|status| match status {
        Status::INVALID_IMAGE => corrupt(unit.source, &status.describe()),
        Status::NO_BINARY_FOR_GPU
        | Status::INVALID_PTX
        | Status::JIT_COMPILER_NOT_FOUND
        | Status::UNSUPPORTED_PTX_VERSION => CudaError::Unavailable {
            message: format!(
                "this binary has no device code that {} (compute capability {}.{}) can run: {} for {}; update the NVIDIA driver, \
                 use a longhaul that names this device, or use --device cpu",
                properties.name,
                properties.compute_capability / 10,
                properties.compute_capability % 10,
                status.describe(),
                unit.source
            ),
        },
        other => other.error(&format!("loading {}", unit.source)),
    })
}

fn load_function(
    module: CUmodule,
    unit: &DeviceCode,
    info: &KernelInfo,
    properties: &DeviceProperties,
) -> Result<Function> {
    use CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    };
    let name = CString::new(info.name).map_err(|_| mismatch(info.name, "has a zero byte in its name"))?;
    let mut raw = std::ptr::null_mut();
    // SAFETY: the module is loaded; the name is a C string; `raw` is a live local.
    Status::of(unsafe { sys::cuModuleGetFunction(&mut raw, module, name.as_ptr()) }).map_err(|status| {
        match status {
            Status::NOT_FOUND => mismatch(info.name, &format!("is missing (in {})", unit.source)),
            other => other.error(info.name),
        }
    })?;
    // Now rather than at the first launch, which may be in a recording, and while memory is still being planned.
    // SAFETY: the function was just found.
    check(info.name, unsafe { sys::cuFuncLoad(raw) })?;
    let (mut offset, mut params_bytes) = (0usize, 0usize);
    // SAFETY: `offset` and `params_bytes` are live locals.
    check(info.name, unsafe { sys::cuFuncGetParamInfo(raw, 0, &mut offset, &mut params_bytes) })?;
    if params_bytes != info.params_bytes {
        let what =
            format!("takes a parameter block of {params_bytes} bytes instead of {}", info.params_bytes);
        return Err(mismatch(info.name, &what));
    }
    let mut fixed = 0;
    // SAFETY: `fixed` is a live local.
    check(info.name, unsafe {
        sys::cuFuncGetAttribute(&mut fixed, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, raw)
    })?;
    let dynamic = properties.shared_bytes_per_block as i32 - fixed;
    // SAFETY: the function is loaded.
    check(info.name, unsafe {
        sys::cuFuncSetAttribute(raw, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic.max(0))
    })?;
    Ok(Function { raw, params_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel of the registry has code, and the code has no other kernels.
    #[test]
    fn the_build_has_every_kernel_of_the_registry() {
        let mut built: Vec<&str> = device_code().iter().flat_map(|unit| unit.kernels).copied().collect();
        let mut wanted: Vec<&str> = crate::kernels().iter().map(|info| info.name).collect();
        built.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(built, wanted);
        verify(device_code()).unwrap();
    }

    #[test]
    fn a_flipped_bit_is_found_and_its_source_named() {
        for unit in device_code() {
            for at in [0, unit.fatbin.len() / 2, unit.fatbin.len() - 1] {
                let mut bytes = unit.fatbin.to_vec();
                bytes[at] ^= 0x10;
                let damaged = DeviceCode { fatbin: bytes.leak(), ..*unit };
                let error = verify(&[damaged]).unwrap_err();
                assert!(matches!(error, CudaError::Unavailable { .. }));
                let message = error.to_string();
                assert!(message.contains(unit.source) && message.contains("again"), "{message}");
            }
        }
    }
}
