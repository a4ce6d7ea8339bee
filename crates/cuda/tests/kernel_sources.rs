//! What the build reads from the kernel sources.

#[path = "../build/sources.rs"]
mod sources;

use std::path::Path;

use sources::{files, kernel_names, kernels};

/// The names that the GPU build embeds are those that this crate launches.
#[test]
fn the_sources_export_the_registry() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
    let mut exported: Vec<String> = kernels(&root)
        .iter()
        .flat_map(|path| kernel_names(&std::fs::read_to_string(path).unwrap()).unwrap())
        .collect();
    let mut launched: Vec<String> = longhaul_cuda::kernels().iter().map(|k| k.name.to_owned()).collect();
    exported.sort();
    launched.sort();
    assert_eq!(exported, launched);
    assert!(files(&root.join("ptx"), "cu").is_empty(), "cuda/ptx holds headers only");
}

#[test]
fn kernel_names_stand_in_the_source() {
    let source = "#include \"x.h\"\n// LONGHAUL_KERNEL(no, …)\nLONGHAUL_KERNEL(first_bf16, P, 1, f)\n  LONGHAUL_KERNEL_CLUSTER(second, P, 1, f<1, 2>)\n";
    assert_eq!(kernel_names(source).unwrap(), ["first_bf16", "second"]);
    assert!(kernel_names("__global__ void f() {}").unwrap_err().contains("no kernel"));
    let made = kernel_names("LONGHAUL_KERNEL(made_##type, P, 1, f)").unwrap_err();
    assert!(made.contains("made_##type"), "{made}");
}
