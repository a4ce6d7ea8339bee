#!/usr/bin/env python3
"""Runs everything in this bundle that needs a GPU and writes one JSON file.

Needs an NVIDIA driver, glibc, python3, and cuBLASLt from a CUDA toolkit or a pip-installed torch, which is found by its path.
Phases run in this order, each within its time limit; a phase that fails does not stop the next.

exit code: 0 every phase passed or was skipped for a reason that is named, 1 one failed, 3 no GPU, 64 wrong usage
"""

import argparse
import ctypes
import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

import checks
import libraries

HERE = pathlib.Path(__file__).resolve().parent
NO_GPU = 3
# The exit code of `longhaul` for a model that does not fit.
OUT_OF_MEMORY = 71

# What one decoded token reads at least: bf16 weights without the embedding (with it where it is the head too), 8 routed
# experts of 64 for the mixture; and K and V of one token in bf16.
MODELS = {
    "qwen2-0.5b": (2 * 494_032_768, 12_288),
    "qwen2-1.5b": (2 * 1_543_714_304, 28_672),
    "qwen2-7b": (2 * 7_070_619_136, 57_344),
    "qwen2-57b-a14b": (2 * 13_704_732_160, 57_344),
}
# Device memory, bytes per second (data sheets), by a part of the device's name.
BANDWIDTH = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100": 2.0e12, "L40S": 0.864e12, "L4": 0.3e12}
KERNELS = ("auto", "mma", "plain")


class Bundle:
    """Where things are, the device under test, and the time that is left."""

    def __init__(self, device, deadline):
        self.device = device
        self.started = time.monotonic()
        self.deadline = deadline
        self.manifest = json.loads((HERE / "MANIFEST.json").read_text())
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="longhaul-"))
        # Copying to another machine may lose the mode.
        for path in ("longhaul", *(program["path"] for program in self.manifest["tests"])):
            if not os.access(HERE / path, os.X_OK):
                (HERE / path).chmod(0o755)
        folders = libraries.find()
        self.libraries = [str(folder) for folder in folders]
        paths = os.pathsep.join(self.libraries)
        self.environment = os.environ | {
            "LONGHAUL_OFFLINE": "1",
            "LONGHAUL_CUDA_LIBRARIES": paths,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (paths, os.environ.get("LD_LIBRARY_PATH", "")))),
            "LONGHAUL_TEST_DEVICE": device,
            "LONGHAUL_TEST_GOLDENS": str(HERE / "goldens"),
            "RUST_BACKTRACE": "0",
        }
        self.found = {}

    def left(self):
        return self.deadline - (time.monotonic() - self.started)

    def damaged(self):
        """Files that are not what was packed."""
        return [
            name
            for name, entry in self.manifest["files"].items()
            if not (HERE / name).is_file() or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != entry["sha256"]
        ]

    def run(self, command, limit, **environment):
        """Runs a command of the bundle: `(exit code or None for a time-out, stdout, stderr)`."""
        command = [str(part) for part in command]
        limit = min(limit, self.left())
        if limit <= 0:
            return None, "", "no time was left"
        try:
            done = subprocess.run(
                command, env=self.environment | environment, capture_output=True, text=True, errors="replace", timeout=limit,
                cwd=self.scratch, stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            text = error.stdout or ""  # bytes even in text mode
            return None, text if isinstance(text, str) else text.decode(errors="replace"), f"ended after {limit:.0f} s"
        except OSError as error:
            return 127, "", f"{command[0]}: {error}"
        return done.returncode, done.stdout, done.stderr

    def longhaul(self, arguments, limit, **environment):
        return self.run([HERE / "longhaul", *arguments], limit, **environment)


def tail(text, characters=3000):
    return text[-characters:]


def gpu_names():
    """Names of the GPUs that the driver offers."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for ordinal in range(count.value):
        name = ctypes.create_string_buffer(256)
        if cuda.cuDeviceGetName(name, 256, ordinal) == 0:
            names.append(name.value.decode(errors="replace"))
    return names


def environment(bundle):
    """What the figures were measured on."""
    fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    code, out, err = bundle.run(query, 20)
    result = {"nvidia_smi": out.strip().splitlines() if code == 0 else err.strip(), "gpus": gpu_names()}
    result |= {"glibc": platform.libc_ver()[1], "kernel": platform.release(), "cpus": os.cpu_count()}
    result |= {"cuda_libraries": bundle.libraries, "commit": bundle.manifest["commit"], "flags": bundle.manifest["nvcc_flags"]}
    if code == 0:
        bundle.found["memory"] = [line.split(",")[2].strip() for line in result["nvidia_smi"][1:]]
    version, out, err = bundle.longhaul(["--version"], 20)
    result["longhaul"] = out.strip() or tail(err)
    result["damaged_files"] = bundle.damaged()
    return ("passed" if version == 0 and not result["damaged_files"] else "failed"), result


def test_program(bundle, program, kernels, limit):
    """One test program with one choice of kernels; failures are run again alone, since one fault fails all that follow."""
    path = HERE / program["path"]
    arguments = ["--test-threads", "1"]
    code, out, err = bundle.run([path, *arguments], limit, LONGHAUL_TEST_KERNELS=kernels)
    passed, failed, names = checks.test_summary(out)
    record = {"program": program["name"], "kernels": kernels, "passed": passed, "failed": failed}
    if code == 0 and passed > 0:
        return True, record
    record |= {"exit": code, "output": tail(out), "stderr": tail(err)}
    record["alone"] = {}
    for name in names[:8]:
        code, out, err = bundle.run([path, *arguments, "--exact", name], 30, LONGHAUL_TEST_KERNELS=kernels)
        record["alone"][name] = "passed" if code == 0 else tail(out + err, 1000)
    return False, record


def tests(bundle, wanted, choices, limit):
    programs = [program for program in bundle.manifest["tests"] if wanted(program["name"])]
    if not programs:
        return "failed", {"error": "the bundle has no such test program"}
    outcomes = [test_program(bundle, program, kernels, limit) for kernels in choices for program in programs]
    ok = all(passed for passed, _ in outcomes)
    return ("passed" if ok else "failed"), {"programs": [record for _, record in outcomes]}


def is_conformance(name):
    return "conformance" in name


def conformance(bundle):
    """Each PTX wrapper against what the emulator computes."""
    return tests(bundle, is_conformance, ("auto",), 90)


def kernels(bundle):
    """Every kernel test, with the kernels the engine would choose and with each family forced."""
    return tests(bundle, lambda name: not is_conformance(name), KERNELS, 120)


def goldens(bundle):
    """Logits and greedy tokens of small checkpoints against float64."""
    records, ok = [], True
    for folder in sorted((HERE / "goldens").iterdir()):
        golden = checks.read_safetensors(folder / "golden.safetensors")
        ids = bundle.scratch / "ids.json"
        ids.write_text(json.dumps([int(i) for i in golden["input_ids"][1]]))
        common = ["--device", bundle.device, "--model", folder, "--ids-file", ids]
        file = folder / "router_margins.json"
        margins = json.loads(file.read_text()) if file.exists() else [float("inf")] * golden["logits"][0][0]
        for dtype, choice, chunk, tolerance in (
            ("bfloat16", "auto", None, 4e-2), ("bfloat16", "auto", 7, 4e-2), ("bfloat16", "mma", None, 4e-2),
            ("bfloat16", "plain", None, 4e-2), ("float32", "auto", None, 1e-3),
        ):
            out = bundle.scratch / "logits.safetensors"
            out.unlink(missing_ok=True)
            arguments = ["logits", *common, "--out", out, "--dtype", dtype, "--kernels", choice]
            code, _, err = bundle.longhaul(arguments + (["--chunk", chunk] if chunk else []), 60)
            record = {"case": folder.name, "dtype": dtype, "kernels": choice, "chunk": chunk}
            if code == 0:
                errors = checks.row_errors(checks.read_safetensors(out)["logits"], golden["logits"])
                record["relative_error"] = max(errors)
                rounded = margins if dtype == "bfloat16" else [float("inf")] * len(errors)
                good = checks.within(errors, rounded, tolerance)
            else:
                record |= {"exit": code, "stderr": tail(err)}
                good = False
            ok, record["passed"] = ok and good, good
            records.append(record)
        expected = [int(i) for i in golden["greedy"][1]]
        for extra in ([], ["--enforce-eager"]):
            arguments = ["generate", *common, "--temperature", "0", "--ignore-eos", "--json", "--dtype", "float32"]
            code, out, err = bundle.longhaul([*arguments, "--max-tokens", len(expected), *extra], 60)
            good = code == 0 and json.loads(out)["ids"] == expected
            ok = ok and good
            record = {"case": folder.name, "greedy": True, "eager": bool(extra), "passed": good}
            records.append(record if good else record | {"exit": code, "stdout": tail(out), "stderr": tail(err)})
    return ("passed" if ok and records else "failed"), {"cases": records}


def sanitizer(bundle):
    """memcheck over small shapes; a launch that reads or writes out of bounds fails it."""
    tool = libraries.find_program("compute-sanitizer", bundle.libraries)
    if tool is None:
        return "skipped", {"reason": "no compute-sanitizer on this machine"}
    folder = HERE / "goldens" / "dense-tied"
    ids = bundle.scratch / "ids.json"
    ids.write_text(json.dumps(list(range(40))))
    records, ok = [], True
    for choice in KERNELS:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", HERE / "longhaul", "logits", "--device", bundle.device]
        command += ["--kernels", choice, "--model", folder, "--ids-file", ids, "--out", bundle.scratch / "sanitized.safetensors"]
        code, out, err = bundle.run(command, 120)
        ok = ok and code == 0
        records.append({"kernels": choice, "exit": code, "output": tail(out + err, 2000)})
    return ("passed" if ok else "failed"), {"runs": records}


def bench(bundle):
    """`longhaul bench kernels`, model by model so that a time-out costs one of them."""
    reports, ok = {}, True
    for model in (*MODELS, "qwen2-72b"):
        code, out, err = bundle.longhaul(["bench", "kernels", "--device", bundle.device, "--json", "--model", model], 90)
        if code == 0:
            reports[model] = json.loads(out)
            bundle.found["copy"] = reports[model].get("copy_bytes_per_second") or bundle.found.get("copy")
            ok = ok and not any("error" in kernel for kernel in reports[model]["kernels"])
        else:
            ok, reports[model] = False, {"exit": code, "stderr": tail(err)}
    return ("passed" if ok else "failed"), reports


def torch(bundle):
    """What torch reaches on the same machine and shapes: attention, products, experts, sampling, a copy."""
    python = libraries.python_with_torch()
    if python is None:
        return "skipped", {"reason": "no python with torch on this machine"}
    code, out, err = bundle.run([python, HERE / "torch_compare.py"], 150)
    try:
        # One JSON object a line: what was measured before a time-out counts.
        records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    except json.JSONDecodeError:
        records = []
    result = {"records": records}
    return ("passed", result) if code == 0 else ("failed", result | {"exit": code, "stderr": tail(err)})


def models(bundle):
    """Whole models with random weights: one request, 2,048 tokens of context, as a fraction of what memory allows."""
    reports, ok = {}, True
    names = gpu_names()
    nominal = next((rate for part, rate in BANDWIDTH.items() if names and part in names[0]), None)
    context, generated = 2048, 128
    for model, (weights, kv) in MODELS.items():
        arguments = ["bench", "latency", "--device", bundle.device, "--load-format", "dummy", "--model", model, "--json"]
        arguments += ["--input-len", context, "--output-len", generated, "--runs", 3]
        code, out, err = bundle.longhaul(arguments, 240)
        if code != 0:
            too_large = code == OUT_OF_MEMORY
            ok = ok and too_large
            reports[model] = {"exit": code, "stderr": tail(err), "too_large": too_large}
            continue
        report = json.loads(out)
        token_bytes = weights + kv * (context + generated / 2)
        rate = report["decode_tok_s"]["median"]
        report["roofline"] = {"bytes_per_token": token_bytes}
        for name, bandwidth in (("data_sheet", nominal), ("measured_copy", bundle.found.get("copy"))):
            if bandwidth:
                report["roofline"][name] = {"bandwidth": bandwidth, "fraction": rate * token_bytes / bandwidth}
        reports[model] = report
    return ("passed" if ok else "failed"), reports


PHASES = (environment, conformance, kernels, goldens, sanitizer, bench, torch, models)


def main(arguments=None):
    names = [phase.__name__ for phase in PHASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, metavar="PHASE", help=f"of {', '.join(names)}; may be repeated")
    parser.add_argument("--deadline", type=float, default=540, metavar="SECONDS", help="start and continue nothing after it [540]")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results.json"), metavar="FILE", help="[results.json]")
    parser.add_argument(
        "--device", choices=("cuda", "emulated"), default="cuda", help="emulated: try the bundle itself on a machine without a GPU"
    )
    options = parser.parse_args(arguments)
    # The phases change folder.
    out = options.out.resolve()
    bundle = Bundle(options.device, options.deadline)
    has_device = options.device == "emulated" or bool(gpu_names())
    results = {"device": options.device, "phases": {}}

    def write():
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(out)

    for phase in PHASES:
        name, began = phase.__name__, time.monotonic()
        if options.only and name not in options.only:
            continue
        if not has_device and phase is not environment:
            status, details = "no GPU", {}
        elif bundle.left() <= 0:
            status, details = "no time", {}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                status, details = phase(bundle)
            except Exception as error:  # a phase must not cost the results of the others
                status, details = "failed", {"error": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - began, 1)
        results["phases"][name] = {"status": status, "seconds": seconds, **details}
        print(f"{name}: {status}, {seconds} s", flush=True)
        write()
    write()
    shutil.rmtree(bundle.scratch, ignore_errors=True)
    print(f"written: {out}")
    if not has_device:
        print("no GPU: nothing was measured", file=sys.stderr)
        return NO_GPU
    statuses = [phase["status"] for phase in results["phases"].values()]
    return 0 if all(status in ("passed", "skipped") for status in statuses) else 1


if __name__ == "__main__":
    sys.exit(main())
