//! What `--device cuda` says when the machine is not fit for it: one message with the remedy, the right exit code, never a
//! panic. The driver is a fake (`tests/fake_cuda/`); damaged device code is tested where it is checked, in `longhaul-cuda`.

mod common;

use std::fmt::Write as _;
use std::process::Command;

use common::{fail, longhaul, succeed};
use longhaul_testkit::fake_cuda;

const UNAVAILABLE: i32 = 69;
const OUT_OF_MEMORY: i32 = 71;

const FOLDER: &str = env!("CARGO_TARGET_TMPDIR");

/// `longhaul generate` with the demo model on `device`.
fn generate(device: &str) -> Command {
    let mut command = longhaul();
    command.args(["generate", "--prompt", "The", "--max-tokens", "2", "--device", device]);
    command.env_remove("LONGHAUL_CUDA_LIBRARIES").env_remove("CUDA_VISIBLE_DEVICES");
    command
}

/// As [`generate`], with the fake driver, its cuBLASLt, and the kernels of this build.
fn on_fake(device: &str, extra: &[(&str, &str)]) -> Command {
    let fake = fake_cuda(FOLDER);
    let kernels = fake.driver.join("kernels.txt");
    let lines = longhaul_cuda::kernels().iter().fold(String::new(), |mut lines, kernel| {
        writeln!(lines, "{} {}", kernel.name, kernel.params_bytes).unwrap();
        lines
    });
    std::fs::write(&kernels, lines).unwrap();
    let mut command = generate(device);
    command
        .env("LD_LIBRARY_PATH", &fake.driver)
        .env("LONGHAUL_CUDA_LIBRARIES", &fake.cublaslt)
        .env("FAKE_CUDA_KERNELS", kernels)
        .envs(extra.iter().copied());
    command
}

/// Exit code and message of `command`; the message is about `device` and has every part.
#[track_caller]
fn refused(command: &mut Command, expected: i32, device: &str, parts: &[&str]) {
    let (code, message) = fail(command);
    assert_eq!(code, expected, "{message}");
    assert!(message.starts_with(&format!("error: --device {device}: ")), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// Where a library is installed, its absence cannot be tested.
fn is_installed(library: &str) -> bool {
    let listed = Command::new("ldconfig").arg("-p").output();
    let installed = listed.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(library));
    if installed {
        eprintln!("skipped: this machine has {library}");
    }
    installed
}

#[test]
fn no_driver() {
    if is_installed("libcuda.so") {
        return;
    }
    refused(
        &mut generate("cuda"),
        UNAVAILABLE,
        "cuda:0",
        &["libcuda.so.1 was not found", "R580", "--gpus all", "--device cpu"],
    );
    // The same binary runs on the CPU and says nothing about GPUs.
    for device in ["cpu", "auto"] {
        let output = succeed(&mut generate(device));
        assert!(!String::from_utf8_lossy(&output.stderr).contains("note:"));
    }
}

#[test]
fn a_driver_that_finds_no_device() {
    for extra in [("FAKE_CUDA_INIT", "100"), ("FAKE_CUDA_COUNT", "0")] {
        refused(
            &mut on_fake("cuda", &[extra]),
            UNAVAILABLE,
            "cuda:0",
            &["finds no GPU", "nvidia-smi", "--device cpu"],
        );
    }
    refused(
        on_fake("cuda", &[("FAKE_CUDA_INIT", "100")]).env("CUDA_VISIBLE_DEVICES", ""),
        UNAVAILABLE,
        "cuda:0",
        &["CUDA_VISIBLE_DEVICES is \"\""],
    );
}

#[test]
fn a_driver_that_does_not_start() {
    for (code, part) in [
        ("34", "stub"),
        ("802", "nvidia-fabricmanager"),
        ("803", "reboot"),
        ("999", "nvidia-smi and dmesg"),
        ("4711", "CUDA error 4711"),
    ] {
        let extra = [("FAKE_CUDA_INIT", code)];
        refused(&mut on_fake("cuda", &extra), UNAVAILABLE, "cuda:0", &[part, "--device cpu"]);
    }
}

#[test]
fn an_old_driver() {
    refused(
        &mut on_fake("cuda", &[("FAKE_CUDA_VERSION", "12040")]),
        UNAVAILABLE,
        "cuda:0",
        &["supports CUDA 12.4", "needs CUDA 13.0", "R580", "update the driver"],
    );
}

#[test]
fn an_old_device() {
    refused(
        &mut on_fake("cuda:1", &[("FAKE_CUDA_CAPABILITY", "75")]),
        UNAVAILABLE,
        "cuda:1",
        &["device 1 (Fake GPU 1)", "compute capability 7.5", "8.0 (Ampere) or newer", "--device cuda:N"],
    );
}

#[test]
fn an_ordinal_that_is_not_there() {
    refused(
        &mut on_fake("cuda:7", &[]),
        UNAVAILABLE,
        "cuda:7",
        &["no device 7", "cuda:0 (Fake GPU 0), cuda:1 (Fake GPU 1)"],
    );
}

#[test]
fn no_product_library() {
    if !is_installed("libcublasLt.so") {
        refused(
            on_fake("cuda", &[]).env("LONGHAUL_CUDA_LIBRARIES", "/nowhere"),
            UNAVAILABLE,
            "cuda:0",
            &["libcublasLt.so.13", "LONGHAUL_CUDA_LIBRARIES = /nowhere", "pip install nvidia-cublas"],
        );
    }
    refused(
        &mut on_fake("cuda", &[("FAKE_CUBLASLT_VERSION", "111103")]),
        UNAVAILABLE,
        "cuda:0",
        &["cuBLASLt 111103 is too old", "cuBLAS 13"],
    );
}

#[test]
fn code_that_the_device_does_not_take() {
    refused(
        &mut on_fake("cuda", &[("FAKE_CUDA_MODULE", "200")]),
        UNAVAILABLE,
        "cuda:0",
        &["corrupt", ".cu", "install the longhaul binary again"],
    );
    refused(
        &mut on_fake("cuda", &[("FAKE_CUDA_MODULE", "209")]),
        UNAVAILABLE,
        "cuda:0",
        &["no device code that Fake GPU 0 (compute capability 9.0) can run", "update the NVIDIA driver"],
    );
    refused(
        on_fake("cuda", &[]).env("FAKE_CUDA_KERNELS", "/dev/null"),
        UNAVAILABLE,
        "cuda:0",
        &["is missing (in ", "build it again"],
    );
}

#[test]
fn a_device_that_others_fill() {
    // Not even a context.
    refused(
        &mut on_fake("cuda", &[("FAKE_CUDA_CONTEXT", "2")]),
        OUT_OF_MEMORY,
        "cuda:0",
        &["out of device memory: creating the CUDA context", "free the memory that others hold"],
    );
    // A context, but not the library's workspace.
    refused(
        &mut on_fake("cuda", &[("FAKE_CUDA_MEMORY", "1048576")]),
        OUT_OF_MEMORY,
        "cuda:0",
        &["workspace", "33554432 bytes", "1048576 are free"],
    );
}

/// What does not fit is refused before anything is loaded, with the table and the context that would fit.
#[test]
fn a_budget_that_does_not_fit() {
    let run = |memory: &str, extra: &[&str]| {
        let mut command = on_fake("cuda", &[("FAKE_CUDA_MEMORY", memory)]);
        command.args(extra);
        command
    };
    // 1 GiB for the demo model: sixteen million tokens do not fit, some do.
    refused(
        &mut run("1073741824", &["--max-model-len", "16m"]),
        OUT_OF_MEMORY,
        "cuda:0",
        &[
            "not enough memory for a context of 16777216 tokens",
            "use --max-model-len",
            "or less",
            "weights",
            "KV pool",
            "16777216 tokens",
            "step arena",
            "total",
            "available",
            "--gpu-memory-utilization 0.9",
        ],
    );
    // Not even the weights.
    refused(
        &mut run("104857600", &["--gpu-memory-utilization", "0.4"]),
        OUT_OF_MEMORY,
        "cuda:0",
        &["no context fits", "--gpu-memory-utilization 0.4"],
    );
}

/// Kernels do nothing here, yet a step goes all its way; a fault of one ends the process with its own code.
#[test]
fn a_fault_has_its_own_exit_code() {
    let fault = ("FAKE_CUDA_FAULT", "embed_gather");
    let (code, message) = fail(&mut on_fake("cuda", &[fault]));
    assert_eq!(code, 76, "{message}");
    // It shows when somebody waits: the kernel is the last one by then.
    for part in ["or a kernel before it", "LONGHAUL_CUDA_SYNC=1", "restart the process"] {
        assert!(message.contains(part), "{message}");
    }
    let (code, message) = fail(&mut on_fake("cuda", &[fault, ("LONGHAUL_CUDA_SYNC", "1")]));
    assert_eq!(code, 76, "{message}");
    assert!(message.contains("embed_gather: CUDA_ERROR_ILLEGAL_ADDRESS"), "{message}");
}

/// `auto` takes the CPU when there is a GPU that cannot be used, and says why.
#[test]
fn auto_falls_back_with_a_word() {
    let output = succeed(&mut on_fake("auto", &[("FAKE_CUDA_VERSION", "12040")]));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("note: the model runs on the CPU") && stderr.contains("too old"), "{stderr}");
    for extra in [("FAKE_CUDA_COUNT", "0"), ("FAKE_CUDA_INIT", "100")] {
        let output = succeed(&mut on_fake("auto", &[extra]));
        assert!(!String::from_utf8_lossy(&output.stderr).contains("note:"));
    }
}
