//! The device code for GPUs: every kernel source compiled by nvcc into one fatbin, embedded in the crate.
//!
//! Writes `$OUT_DIR/device_code.rs`, a table of the fatbins and the kernels in each. `$OUT_DIR/device_code/` keeps the fatbins
//! and, beside each, what the compiler said about it (`log`): `scripts/device-code-gate` reads both.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::{Job, run};
use crate::sources::{kernel_names, kernels};

/// Machine code for Ampere, Ada and Hopper, and PTX that later devices compile when they load it: of compute_89, since wgmma and
/// its like (behind `__CUDA_ARCH__ >= 900`) exist on sm_90a alone.
///
/// No `-lineinfo`: it doubles the size. `LONGHAUL_NVCC_FLAGS=-lineinfo` adds it for a profiler.
const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O3",
    "--fatbin",
    // A quarter of the size; the driver unpacks a module when it loads it.
    "-compress-mode=size",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_89,code=sm_89",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_89,code=compute_89",
    // Registers, shared memory and stack of each kernel in the log; spills and local memory as warnings.
    "-Xptxas=-v",
    "-Xptxas=--warn-on-spills",
    "-Xptxas=--warn-on-local-memory-usage",
];

/// Compiles what has changed and writes the table.
///
/// # Errors
/// No nvcc, a source that does not compile, or a source without kernels.
pub fn build(root: &Path, out: &Path) -> Result<(), String> {
    for variable in ["NVCC", "CUDA_HOME", "LONGHAUL_NVCC_FLAGS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let nvcc = find_nvcc(root)?;
    let more_flags = std::env::var("LONGHAUL_NVCC_FLAGS").unwrap_or_default();
    let mut sources = Vec::new();
    let mut jobs = Vec::new();
    for source in kernels(root) {
        let name = source.strip_prefix(root).unwrap_or(&source).to_path_buf();
        let output = out.join("device_code").join(&name).with_extension("fatbin");
        let folder = output.parent().unwrap_or(out);
        std::fs::create_dir_all(folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
        let dependencies = output.with_extension("d");
        let mut command = Command::new(&nvcc);
        command.args(FLAGS).args(more_flags.split_whitespace());
        command.arg("-MD").arg("-MF").arg(&dependencies).arg("-o").arg(&output).arg(&source);
        sources.push((name, source.clone(), output.clone()));
        jobs.push(Job { source, output, dependencies, command });
    }
    for (source, message) in run(jobs)? {
        for line in message.lines().filter(|line| is_warning(line)) {
            println!("cargo:warning={}: {line}", source.display());
        }
    }
    write_table(&sources, &out.join("device_code.rs"))
}

/// Warnings, and ptxas' remarks with a number such as "(C7510) Potential Performance Loss: wgmma.mma_async instructions are
/// serialized", which it calls information; but for C7519 (a fence of wgmma was injected), by which nothing is serialised.
fn is_warning(line: &str) -> bool {
    line.contains("warning")
        || (line.starts_with("ptxas") && line.contains("(C") && !line.contains("(C7519)"))
}

/// nvcc where the environment names it, else where it is usually found. A variable that names no nvcc is an error rather
/// than skipped.
fn find_nvcc(root: &Path) -> Result<PathBuf, String> {
    let named = std::env::var_os("NVCC").map(|path| ("NVCC", PathBuf::from(path)));
    let home = std::env::var_os("CUDA_HOME").map(|path| ("CUDA_HOME", PathBuf::from(path).join("bin/nvcc")));
    if let Some((variable, path)) = named.or(home) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!("{variable} is set, but there is no {}: correct it or unset it", path.display()))
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join("nvcc"))
        .chain([
            root.join("../target/cuda-toolchain/nvidia/cu13/bin/nvcc"),
            PathBuf::from("/usr/local/cuda/bin/nvcc"),
        ])
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            "feature `cuda` needs nvcc 13: run scripts/cuda-toolchain (needs python3 with pip, no root rights), or set \
             CUDA_HOME to a CUDA toolkit or NVCC to the compiler; without the feature, nothing of CUDA is needed"
                .to_owned()
        })
}

fn write_table(sources: &[(PathBuf, PathBuf, PathBuf)], path: &Path) -> Result<(), String> {
    let mut table = String::from("pub static DEVICE_CODE: &[DeviceCode] = &[\n");
    for (name, source, fatbin) in sources {
        let text = std::fs::read_to_string(source).map_err(|e| format!("{}: {e}", source.display()))?;
        let kernels = kernel_names(&text).map_err(|e| format!("{}: {e}", source.display()))?;
        let bytes = std::fs::read(fatbin).map_err(|e| format!("{}: {e}", fatbin.display()))?;
        let crc32 = crc32fast::hash(&bytes);
        let _ = writeln!(
            table,
            "    DeviceCode {{ source: {:?}, crc32: {crc32:#010x}, fatbin: &Aligned(*include_bytes!({fatbin:?})).0, kernels: &{kernels:?} }},",
            name.to_string_lossy(),
        );
    }
    table += "];\n";
    // Unchanged content keeps its time, so that the crate is not compiled again.
    if std::fs::read_to_string(path).is_ok_and(|old| old == table) {
        return Ok(());
    }
    std::fs::write(path, table).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
