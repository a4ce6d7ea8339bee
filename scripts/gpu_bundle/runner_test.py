#!/usr/bin/env python3
"""Tests the runner of the GPU bundle on a machine without a GPU, with programs that stand in for those of the bundle."""

import array
import hashlib
import json
import os
import pathlib
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(SOURCE))
import checks  # noqa: E402
import libraries  # noqa: E402

# Answers `logits` with the values in $FAKE_LOGITS, `generate` with the ids 7, 8.
LONGHAUL = """#!/usr/bin/env python3
import json, os, shutil, sys, time
command = sys.argv[1]
if command == "--version":
    print("longhaul 0")
elif command == "logits":
    shutil.copy(os.environ["FAKE_LOGITS"], sys.argv[sys.argv.index("--out") + 1])
elif command == "generate":
    print(json.dumps({"ids": [7, 8]}))
elif command == "bench":
    time.sleep(60)
"""
# Two tests; the second fails with forced mma kernels.
PROGRAM = """#!/usr/bin/env python3
import os, sys
bad = os.environ["LONGHAUL_TEST_KERNELS"] == "mma"
print("test first ... ok")
print("test second ... " + ("FAILED" if bad else "ok"))
print(f"test result: {'FAILED' if bad else 'ok'}. {1 if bad else 2} passed; {1 if bad else 0} failed; 0 ignored")
sys.exit(101 if bad else 0)
"""


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, (kind, shape, values) in tensors.items():
        blob = array.array(checks.TYPES[kind], values).tobytes()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Runner(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for name in ("run.py", "checks.py", "libraries.py"):
            shutil.copy(SOURCE / name, self.folder)
        self.program("longhaul", LONGHAUL)
        self.program("tests/gemm", PROGRAM)
        packed = hashlib.sha256((self.folder / "longhaul").read_bytes()).hexdigest()
        manifest = {"commit": "abc", "nvcc_flags": "", "tests": [{"name": "gemm", "path": "tests/gemm"}]}
        manifest["files"] = {"longhaul": {"sha256": packed}}
        (self.folder / "MANIFEST.json").write_text(json.dumps(manifest))
        golden = self.folder / "goldens" / "dense-tied"
        golden.mkdir(parents=True)
        self.golden = {"input_ids": ("I64", [2], [1, 2]), "greedy": ("I64", [2], [7, 8]), "logits": ("F32", [1, 2], [1.0, -2.0])}
        write_safetensors(golden / "golden.safetensors", self.golden)

    def program(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run_bundle(self, *arguments, logits=(1.0, -2.0)):
        answer = self.folder / "answer.safetensors"
        write_safetensors(answer, {"logits": ("F32", [1, 2], logits)})
        command = [sys.executable, self.folder / "run.py", "--out", self.folder / "results.json", *arguments]
        environment = os.environ | {"FAKE_LOGITS": str(answer)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, json.loads((self.folder / "results.json").read_text())["phases"], done

    @unittest.skipIf(shutil.which("nvidia-smi"), "this machine has a GPU")
    def test_without_a_gpu_every_phase_says_so(self):
        code, phases, done = self.run_bundle()
        self.assertEqual(code, 3, done.stderr)
        self.assertEqual(phases.pop("environment")["status"], "passed")
        self.assertEqual({phase["status"] for phase in phases.values()}, {"no GPU"})
        self.assertEqual(list(phases), ["conformance", "kernels", "goldens", "sanitizer", "bench", "torch", "models"])

    def test_equal_logits_and_tokens_pass(self):
        code, phases, done = self.run_bundle("--device", "emulated", "--only", "goldens")
        self.assertEqual((code, list(phases)), (0, ["goldens"]), done.stderr)
        self.assertEqual(len(phases["goldens"]["cases"]), 7)

    def test_other_logits_fail(self):
        for logits in ((1.2, -2.0), (float("nan"), -2.0), (1.0, float("inf"))):
            code, phases, _ = self.run_bundle("--device", "emulated", "--only", "goldens", logits=logits)
            self.assertEqual((code, phases["goldens"]["status"]), (1, "failed"), logits)

    def test_a_failing_kernel_test_is_named_and_run_alone(self):
        code, phases, _ = self.run_bundle("--device", "emulated", "--only", "kernels")
        self.assertEqual(code, 1)
        by_kernels = {record["kernels"]: record for record in phases["kernels"]["programs"]}
        self.assertEqual(by_kernels["auto"]["passed"], 2)
        self.assertEqual(list(by_kernels["mma"]["alone"]), ["second"])
        self.assertNotIn("alone", by_kernels["plain"])

    def test_a_bundle_without_conformance_tests_fails(self):
        code, phases, _ = self.run_bundle("--device", "emulated", "--only", "conformance")
        self.assertEqual((code, phases["conformance"]["status"]), (1, "failed"))

    def test_the_deadline_ends_a_phase_and_the_next_do_not_start(self):
        code, phases, _ = self.run_bundle("--device", "emulated", "--only", "bench", "--only", "models", "--deadline", "2")
        self.assertEqual(code, 1)
        self.assertEqual(phases["bench"]["status"], "failed")
        self.assertEqual(phases["models"]["status"], "no time")
        self.assertIsNone(phases["bench"]["qwen2-0.5b"]["exit"])

    def test_a_damaged_file_is_named(self):
        self.program("longhaul", LONGHAUL + "\n")
        code, phases, _ = self.run_bundle("--device", "emulated", "--only", "environment")
        self.assertEqual((code, phases["environment"]["damaged_files"]), (1, ["longhaul"]))

    def test_libraries_are_found_by_their_path(self):
        site = self.folder / "site-packages"
        for name in ("nvidia/cuda_runtime/lib/libcudart.so.13", "nvidia/cublas/lib/libcublasLt.so.13", "torch/lib/libtorch.so"):
            (site / name).parent.mkdir(parents=True)
            (site / name).touch()
        found, libraries.site_folders = libraries.site_folders, lambda: [site]
        try:
            folders = libraries.find()
        finally:
            libraries.site_folders = found
        self.assertEqual(folders[0], site / "nvidia" / "cublas" / "lib")
        self.assertIn(site / "torch" / "lib", folders)


if __name__ == "__main__":
    result = unittest.main(exit=False, verbosity=2).result
    failed = len(result.failures) + len(result.errors)
    print(f"gpu-bundle runner: {result.testsRun - failed} passed, {failed} failed")
    sys.exit(1 if failed or result.testsRun == 0 else 0)
