//! Where the libraries come from: nothing of CUDA is linked.

use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as driver;
use libloading::Library;

use crate::{CudaError, Result};

/// Folders that are searched before the loader's own, separated by colons.
pub(super) const FOLDERS: &str = "LONGHAUL_CUDA_LIBRARIES";

/// The product library under the names of its releases, newest first.
const CUBLASLT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
/// Its oldest release that is used, as `cublasLtGetVersion` counts.
const CUBLASLT_VERSION: usize = 120_000;

/// Whether the driver's library is there.
pub(super) fn has_driver() -> bool {
    // SAFETY: loading libcuda runs the initialisers of the system's own driver, which any CUDA program does.
    unsafe { driver::is_culib_present() }
}

/// Makes cuBLASLt available to [`cudarc`].
///
/// # Errors
/// [`CudaError::Unavailable`] with the names and folders that were tried.
pub(super) fn load_cublaslt() -> Result<()> {
    preload();
    // SAFETY: as in `has_driver`, for NVIDIA's product library.
    if !unsafe { lt::is_culib_present() } {
        let folders = std::env::var(FOLDERS).unwrap_or_default();
        let tried = if folders.is_empty() { String::new() } else { format!(" and in {FOLDERS} = {folders}") };
        return Err(CudaError::Unavailable {
            message: format!(
                "the library for matrix products is missing: {} was not found by the loader{tried}; install cuBLAS 13 \
                 (package libcublas-13-0, or pip install nvidia-cublas), set {FOLDERS} to the folder that holds it, such as \
                 …/site-packages/nvidia/cu13/lib, or use --device cpu",
                CUBLASLT[0]
            ),
        });
    }
    // SAFETY: the library is loaded; the call takes nothing and touches no device.
    let version = unsafe { lt::cublasLtGetVersion() };
    if version < CUBLASLT_VERSION {
        return Err(CudaError::Unavailable {
            message: format!(
                "cuBLASLt {version} is too old: 12.0 or newer is needed; install cuBLAS 13 (package libcublas-13-0, or pip \
                 install nvidia-cublas) and set {FOLDERS} to its folder, or use --device cpu"
            ),
        });
    }
    Ok(())
}

/// Loads cuBLASLt by its exact name, once, for the life of the process. A library that is loaded answers to its name, so a
/// later search finds it wherever it lies.
fn preload() {
    static LOADED: OnceLock<Option<Library>> = OnceLock::new();
    LOADED.get_or_init(|| {
        let folders = std::env::var_os(FOLDERS).unwrap_or_default();
        let in_folders = std::env::split_paths(&folders)
            .filter(|folder| !folder.as_os_str().is_empty())
            .flat_map(|folder| CUBLASLT.map(|name| folder.join(name)));
        in_folders
            .chain(CUBLASLT.map(PathBuf::from))
            // SAFETY: as in `load_cublaslt`; the user named the folder.
            .find_map(|path| unsafe { Library::new(path) }.ok())
    });
}
