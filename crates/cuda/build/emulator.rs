//! The device code and the emulator, compiled by a C++20 compiler into one static library.

use std::path::{Path, PathBuf};

use crate::compile::{Job, run};
use crate::sources::{files, kernels};

const FLAGS: [&str; 8] = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    // A multiplication and an addition stay two roundings, whatever the CPU.
    "-ffp-contract=off",
];

/// Compiles every source; sets `cfg(longhaul_emulator)` when it worked. Without a compiler the crate still builds and the
/// emulated driver reports what is missing: a machine that only serves needs no g++.
///
/// # Errors
/// A source that does not compile.
pub fn build(root: &Path, out: &Path) -> Result<(), String> {
    println!("cargo:rerun-if-env-changed=CXX");
    let mut build = cc::Build::new();
    build.cpp(true).opt_level(2).debug(false).warnings(false).cargo_warnings(false);
    let compiler = match build.try_get_compiler() {
        Ok(compiler) if build.is_flag_supported("-std=c++20").unwrap_or(false) => compiler,
        _ => {
            println!(
                "cargo:warning=no C++20 compiler (g++ 11 or newer): this build has no emulated device; install g++ \
                 and build again for --device emulated"
            );
            return Ok(());
        }
    };
    println!("cargo:rustc-cfg=longhaul_emulator");
    let mut objects = Vec::new();
    let mut jobs = Vec::new();
    for source in files(&root.join("emulator"), "cpp").into_iter().chain(kernels(root)) {
        let folder = source.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let stem = source.file_stem().unwrap_or_default().to_string_lossy();
        let object = out.join(format!("{folder}_{stem}.o"));
        let dependencies = object.with_extension("d");
        let mut command = compiler.to_command();
        // A .cu file is C++ here.
        command.args(FLAGS).args(["-x", "c++", "-c"]).arg(&source).arg("-o").arg(&object);
        command.arg("-MD").arg("-MF").arg(&dependencies);
        objects.push(object.clone());
        jobs.push(Job { source, output: object, dependencies, command });
    }
    for (source, message) in run(jobs)? {
        for line in message.lines().filter(|line| line.contains("warning:")) {
            println!("cargo:warning={}: {line}", source.display());
        }
    }
    archive(out, &objects);
    println!("cargo:rustc-link-search=native={}", out.display());
    // Kernels register themselves: nothing refers to their objects.
    println!("cargo:rustc-link-lib=static:+whole-archive=longhaul_emulated");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    Ok(())
}

/// Packs exactly these objects: a kernel that was removed must not stay in the library.
fn archive(out: &Path, objects: &[PathBuf]) {
    let library = out.join("liblonghaul_emulated.a");
    let _ = std::fs::remove_file(&library);
    let mut build = cc::Build::new();
    build.cpp(true).cargo_metadata(false).objects(objects);
    build.compile("longhaul_emulated");
}
