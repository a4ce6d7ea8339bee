//! Builds the device code of `cuda/`: for the CPU (feature `emulator`).

#[path = "build/compile.rs"]
mod compile;
#[path = "build/emulator.rs"]
mod emulator;
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
    if std::env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        emulator::build(&root, &out);
    }
}
