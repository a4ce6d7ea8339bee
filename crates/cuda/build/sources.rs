//! Where the device code lies.

use std::path::{Path, PathBuf};

/// Folders of `cuda/` that hold no kernels.
const NOT_KERNELS: [&str; 3] = ["common", "emulator", "ptx"];

/// Every kernel source: `cuda/<family>/<kernel>.cu`; those of `cuda/conformance` only with that feature.
pub fn kernels(root: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir() && !NOT_KERNELS.iter().any(|name| path.ends_with(name)))
        .filter(|path| cfg!(feature = "conformance") || !path.ends_with("conformance"))
        .collect();
    folders.sort();
    folders.iter().flat_map(|folder| files(folder, "cu")).collect()
}

/// Files of `folder` with this extension, sorted.
pub fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}

/// The kernels that a source exports, in its order: the first argument of each `LONGHAUL_KERNEL(…)` and
/// `LONGHAUL_KERNEL_…(…)`.
///
/// # Errors
/// None, or a name that only the preprocessor knows.
pub fn kernel_names(source: &str) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for line in source.lines() {
        let Some(macro_call) = line.trim_start().strip_prefix("LONGHAUL_KERNEL") else { continue };
        let Some((_, arguments)) = macro_call.split_once('(') else { continue };
        let name = arguments.split(',').next().unwrap_or_default().trim();
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(format!(
                "the name of a kernel must stand in its LONGHAUL_KERNEL, not be made by a macro: {name:?}"
            ));
        }
        names.push(name.to_owned());
    }
    if names.is_empty() {
        return Err("exports no kernel (LONGHAUL_KERNEL): a file without kernels is a header".to_owned());
    }
    Ok(names)
}
