//! Builds the device code of `cuda/`: for the CPU (feature `emulator`) and for GPUs (feature `cuda`).

#[path = "build/compile.rs"]
mod compile;
#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/sources.rs"]
mod sources;

use std::path::PathBuf;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(longhaul_emulator)");
    let manifest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = manifest.join("../../cuda").canonicalize().expect("cuda/ lies beside crates/");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed={}", root.display());
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=build.rs");
    let has = |feature: &str| std::env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if has("CUDA") {
        report(nvcc::build(&root, &out));
    }
    if has("EMULATOR") {
        report(emulator::build(&root, &out));
    }
}

/// Makes the build fail with the message, without a backtrace of this script.
fn report(result: Result<(), String>) {
    for line in result.err().unwrap_or_default().lines() {
        println!("cargo::error={line}");
    }
}
