//! A CUDA driver and a cuBLASLt that need no GPU (`tests/fake_cuda/`), for tests of everything above them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names the test whose body a child process runs.
const CHILD: &str = "LONGHAUL_TEST_CHILD";

/// Folders with the fakes, for `LD_LIBRARY_PATH` and `LONGHAUL_CUDA_LIBRARIES`.
#[derive(Debug)]
pub struct FakeCuda {
    /// Holds `libcuda.so.1`.
    pub driver: PathBuf,
    /// Holds `libcublasLt.so.13`.
    pub cublaslt: PathBuf,
}

/// Compiles the fakes, once a process, below `folder` (a test's `CARGO_TARGET_TMPDIR`).
///
/// # Panics
/// Without a C++ compiler.
pub fn fake_cuda(folder: &str) -> &'static FakeCuda {
    static BUILT: OnceLock<FakeCuda> = OnceLock::new();
    BUILT.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fake_cuda");
        // Test programs may run side by side.
        let folder = Path::new(folder).join(format!("fake_cuda-{}", std::process::id()));
        let fake = FakeCuda { driver: folder.join("driver"), cublaslt: folder.join("cublaslt") };
        let driver = fake.driver.join("libcuda.so.1");
        compile(&sources.join("cuda.cpp"), &driver, None);
        // The unversioned name comes first in a search: a real driver must not.
        std::os::unix::fs::symlink(&driver, fake.driver.join("libcuda.so")).unwrap();
        compile(&sources.join("cublaslt.cpp"), &fake.cublaslt.join("libcublasLt.so.13"), Some(&driver));
        fake
    })
}

fn compile(source: &Path, library: &Path, with: Option<&Path>) {
    let name = library.file_name().unwrap().to_str().unwrap();
    std::fs::create_dir_all(library.parent().unwrap()).unwrap();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-O2", "-fPIC", "-shared", &format!("-Wl,-soname,{name}"), "-o"]);
    command.arg(library).arg(source).args(with);
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `body` in a process of its own that finds the fakes and has the environment `extra`: libraries and their state are
/// per process. `name` is the calling test's full name.
///
/// # Panics
/// When `body` does, with its output.
pub fn with_fake_cuda(folder: &str, name: &str, extra: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        return body();
    }
    let fake = fake_cuda(folder);
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, name)
        .env("LD_LIBRARY_PATH", &fake.driver)
        .env("LONGHAUL_CUDA_LIBRARIES", &fake.cublaslt)
        .envs(extra.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{name} in a child process: {text}");
}
