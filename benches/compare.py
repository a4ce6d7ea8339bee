"""Run the three engines one after another, write benches/results/DATE-cpu.json and print a table.

Started by run.sh, which builds what is needed and sets the environment variables LONGHAUL (the command), THREADS,
INPUT_LEN, OUTPUT_LEN and REPEATS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).resolve().parent
REPOSITORY = BENCHES.parent
DTYPES = ("float32", "bfloat16")
ENGINES = ("longhaul", "transformers", "candle-transformers")


def run_json(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run `command` in the repository's root and return the JSON object it prints; its stderr passes through."""
    print("$", shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def output_of(*command: str) -> str:
    """Return what `command` prints, or "unknown" where it fails."""
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in cpu_info if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(values.get("flags", "").split())
    interesting = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": values.get("model name", "unknown"),
        "family_model_stepping": "/".join(values.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "features": [name for name in interesting if name in flags],
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "rustc": output_of("rustc", "--version"),
        "load_average_at_start": os.getloadavg()[0],
    }


def speed(value: float | dict[str, float]) -> float:
    """Return a median: Longhaul reports it beside the smallest and the largest value."""
    return value["median"] if isinstance(value, dict) else value


def table(results: dict[str, dict[str, Any]], input_len: int, output_len: int) -> str:
    """Return the speeds as a Markdown table."""
    lines = [
        f"| engine | dtype | prefill of {input_len}, tokens/s | decode of {output_len}, tokens/s |",
        "|---|---|---:|---:|",
    ]
    for engine in ENGINES:
        for dtype in DTYPES:
            if (result := results.get(engine, {}).get("results", {}).get(dtype)) is not None:
                prefill, decode = speed(result["prefill_tok_s"]), speed(result["decode_tok_s"])
                lines.append(f"| {engine} | {dtype} | {prefill:.1f} | {decode:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file (default: benches/results/DATE-cpu.json)")
    arguments = parser.parse_args(argv)
    threads = os.environ.get("THREADS", "2")
    input_len, output_len = os.environ.get("INPUT_LEN", "512"), os.environ.get("OUTPUT_LEN", "64")
    repeats = os.environ.get("REPEATS", "5")
    lengths = ["--input-len", input_len, "--output-len", output_len, "--repeats", repeats]
    description = machine()

    results: dict[str, dict[str, Any]] = {}
    if "longhaul" in arguments.engines:
        if "LONGHAUL" not in os.environ:
            parser.error("LONGHAUL is not set: start benches/run.sh, or set it to the command that prints the JSON")
        command = shlex.split(os.environ["LONGHAUL"])
        results["longhaul"] = {
            "command": command,
            "results": {dtype: run_json([*command, "--dtype", dtype]) for dtype in DTYPES},
        }
    if "transformers" in arguments.engines:
        script = str(BENCHES / "transformers_cpu.py")
        results["transformers"] = run_json([sys.executable, script, *lengths, "--threads", threads])
    if "candle-transformers" in arguments.engines:
        binary = str(BENCHES / "candle-qwen2" / "target" / "release" / "candle-qwen2")
        results["candle-transformers"] = run_json([binary, *lengths], RAYON_NUM_THREADS=threads)

    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "uncommitted_changes": output_of("git", "status", "--porcelain", "--untracked-files=no") != "unknown",
        "machine": description,
        "engines": results,
    }
    out = arguments.out or BENCHES / "results" / f"{now.date()}-cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(results, int(input_len), int(output_len)))
    print(f"\nwritten to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
