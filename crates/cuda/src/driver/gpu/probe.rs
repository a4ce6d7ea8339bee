//! What the machine has, found without a panic: library, driver, devices, in the order in which things can be missing.

use std::ffi::{CStr, c_char, c_int};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute};

use super::libraries;
use super::status::{Status, check};
use crate::driver::DeviceProperties;
use crate::{CudaError, Result};

/// Machine code of CUDA 13.0 needs a driver that knows it, as `cuDriverGetVersion` counts.
const DRIVER_VERSION: c_int = 13_000;
/// The driver's branch of that version.
const DRIVER_BRANCH: &str = "R580";
/// Ampere: the first with bf16 and cp.async.
const COMPUTE_CAPABILITY: u32 = 80;

fn unavailable(message: String) -> CudaError {
    CudaError::Unavailable { message }
}

/// Whether a driver that starts has devices.
pub(super) fn is_present() -> bool {
    let mut count = 0;
    libraries::has_driver()
        // SAFETY: the library is there; flags must be 0; `count` is a live local.
        && unsafe { sys::cuInit(0) as u32 == 0 && sys::cuDeviceGetCount(&mut count) as u32 == 0 }
        && count > 0
}

/// The devices of the driver, after the checks that need no device. At least one.
///
/// # Errors
/// [`CudaError::Unavailable`]: no driver library, a driver that does not start, no device, or an old driver.
pub(super) fn devices() -> Result<Vec<CUdevice>> {
    if !libraries::has_driver() {
        return Err(unavailable(format!(
            "no NVIDIA driver: libcuda.so.1 was not found; install the driver, branch {DRIVER_BRANCH} or newer (in a \
             container: start it with the GPUs, such as docker run --gpus all), or use --device cpu"
        )));
    }
    // SAFETY: the library is there; flags must be 0.
    Status::of(unsafe { sys::cuInit(0) }).map_err(refused)?;
    let mut count = 0;
    // SAFETY: the driver is initialised; `count` is a live local.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    if count <= 0 {
        return Err(refused(Status::NO_DEVICE));
    }
    let mut version = 0;
    // SAFETY: `version` is a live local.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < DRIVER_VERSION {
        return Err(unavailable(format!(
            "the NVIDIA driver is too old: it supports CUDA {}.{}, and this build needs CUDA 13.0, which is driver branch \
             {DRIVER_BRANCH} or newer; update the driver (nvidia-smi shows its version), or use --device cpu",
            version / 1000,
            version % 1000 / 10
        )));
    }
    (0..count)
        .map(|ordinal| {
            let mut device = 0;
            // SAFETY: `device` is a live local.
            check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
            Ok(device)
        })
        .collect()
}

/// The device of this ordinal.
///
/// # Errors
/// [`CudaError::Unavailable`]: those of [`devices`], an ordinal that is not there, a device that is too old.
pub(super) fn device(ordinal: usize) -> Result<(CUdevice, DeviceProperties)> {
    let devices = devices()?;
    let Some(&device) = devices.get(ordinal) else {
        let present: Vec<String> = devices
            .iter()
            .enumerate()
            .map(|(n, &device)| Ok(format!("cuda:{n} ({})", properties(device)?.name)))
            .collect::<Result<_>>()?;
        return Err(unavailable(format!(
            "there is no device {ordinal}; this machine has {}{}",
            present.join(", "),
            visible_devices()
        )));
    };
    let properties = properties(device)?;
    if properties.compute_capability < COMPUTE_CAPABILITY {
        let capability = properties.compute_capability;
        return Err(unavailable(format!(
            "device {ordinal} ({}) has compute capability {}.{}; 8.0 (Ampere) or newer is needed: choose another with \
             --device cuda:N, or use --device cpu",
            properties.name,
            capability / 10,
            capability % 10
        )));
    }
    Ok((device, properties))
}

/// What is known about a device.
///
/// # Errors
/// The driver's.
pub(super) fn properties(device: CUdevice) -> Result<DeviceProperties> {
    use CUdevice_attribute::*;
    let attribute = |which: CUdevice_attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is a live local; the device came from the driver.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
        Ok(value.max(0) as u32)
    };
    let mut name = [0 as c_char; 256];
    // SAFETY: the buffer is as long as stated; the driver ends the name with a zero.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int - 1, device)
    })?;
    // SAFETY: zero-terminated: the last byte was zero and stays so.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory_bytes = 0usize;
    // SAFETY: `memory_bytes` is a live local.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, device) })?;
    Ok(DeviceProperties {
        name,
        compute_capability: attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        memory_bytes: memory_bytes as u64,
    })
}

/// Why a driver that is there does not start.
fn refused(status: Status) -> CudaError {
    let remedy = match status {
        Status::NO_DEVICE => format!(
            "the NVIDIA driver finds no GPU{}; check nvidia-smi and, in a container, that it was started with the GPUs, or use \
             --device cpu",
            visible_devices()
        ),
        Status::STUB_LIBRARY => {
            "libcuda.so is the CUDA toolkit's stub for linking, not a driver: remove the stubs folder from LD_LIBRARY_PATH \
             and install the NVIDIA driver, or use --device cpu"
                .into()
        }
        Status::SYSTEM_NOT_READY => {
            "the system is not ready for CUDA: on a machine with NVSwitch, start the service nvidia-fabricmanager of the \
             driver's version; or use --device cpu"
                .into()
        }
        Status::SYSTEM_DRIVER_MISMATCH => {
            "the NVIDIA kernel module and libcuda are of different versions: reboot after a driver update, or make the \
             container use the host's driver; or use --device cpu"
                .into()
        }
        other => format!(
            "the NVIDIA driver does not start: {}; check nvidia-smi and dmesg, or use --device cpu",
            other.describe()
        ),
    };
    unavailable(remedy)
}

/// A remark when devices may be hidden.
fn visible_devices() -> String {
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(value) => format!(" (CUDA_VISIBLE_DEVICES is \"{value}\")"),
        Err(_) => String::new(),
    }
}
