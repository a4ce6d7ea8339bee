//! Running the `longhaul` binary.

#![allow(dead_code)]

#[cfg(target_os = "linux")]
pub mod nodes;
pub mod serve;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use longhaul_testkit::Golden;
use serde_json::Value;

/// The binary under test, without the network and without the caller's settings.
pub fn longhaul() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command
        .env("LONGHAUL_OFFLINE", "1")
        .env_remove("LONGHAUL_CPU_ISA")
        .env_remove("LONGHAUL_EMULATOR")
        .env_remove("LONGHAUL_NODE_KEY_FILE")
        .stdin(Stdio::null());
    command
}

/// Runs `command`, which must succeed.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?} ended with {:?}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs `command`, which must fail in an orderly way; returns exit code and message.
pub fn fail(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().unwrap_or_else(|| panic!("{command:?} was killed: {:?}", output.status));
    assert_ne!(code, 0, "{command:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
    assert!(!message.contains("panicked"), "{command:?} panicked: {message}");
    assert_ne!(code, 101, "{command:?} panicked");
    assert!(
        output.stdout.is_empty(),
        "{command:?} failed, yet wrote {}",
        String::from_utf8_lossy(&output.stdout)
    );
    (code, message)
}

/// The JSON object that `command` prints.
pub fn json_output(command: &mut Command) -> Value {
    let output = succeed(command);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{command:?}: {e}: {}", String::from_utf8_lossy(&output.stdout)))
}

/// Runs `command` with `input` on stdin.
pub fn with_stdin(command: &mut Command, input: &str) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// A file with a JSON array of ids.
pub fn ids_file(ids: &[u32]) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
    write!(file, "{}", serde_json::to_string(ids).unwrap()).unwrap();
    file
}

/// Shape and values of `longhaul logits` on a golden case, on the CPU.
pub fn logits(golden: &Golden, chunk: Option<usize>, extra: &[&str]) -> (Vec<usize>, Vec<f32>) {
    logits_on("cpu", golden, chunk, extra)
}

/// As [`logits`], on `device`.
pub fn logits_on(
    device: &str,
    golden: &Golden,
    chunk: Option<usize>,
    extra: &[&str],
) -> (Vec<usize>, Vec<f32>) {
    let ids = ids_file(&golden.input_ids);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let mut command = longhaul();
    command.args(["logits", "--device", device, "--model"]).arg(&golden.dir);
    command.arg("--ids-file").arg(ids.path()).arg("--out").arg(&out).args(extra);
    if let Some(chunk) = chunk {
        command.args(["--chunk", &chunk.to_string()]);
    }
    succeed(&mut command);
    read_logits(&out)
}

/// Shape and values of the tensor `logits` in a safetensors file.
pub fn read_logits(path: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("logits").unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    let values =
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (tensor.shape().to_vec(), values)
}

/// A file of the repository.
pub fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}
