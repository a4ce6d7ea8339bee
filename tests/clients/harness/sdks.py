"""The suites that drive the OpenAI SDKs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import scripted
from harness.packages import HERE, TARGET, environment, junit, node, pip_for
from harness.servers import KEY, OTHER_KEY, Server


def python(binary: str) -> dict:
    """`python/`, by pytest."""
    variables = environment(pip_for("python"), LONGHAUL_BINARY=binary)
    report = TARGET / "python.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", f"--junitxml={report}"]
    return junit(report, subprocess.run(command, cwd=HERE / "python", env=variables).returncode)


def javascript(binary: str) -> dict:
    """`node/`, by Node's own test runner."""
    program, npm = node()
    # Modules are looked up beside the files that import them, so the files go where the modules may be.
    folder = TARGET / "node"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (HERE / "node/package-lock.json").read_bytes()
    installed = folder / "package-lock.json"
    fresh = not (folder / "node_modules").is_dir() or not installed.is_file() or installed.read_bytes() != lock
    for old in folder.glob("*.mjs"):
        old.unlink()
    shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)
    variables = {**os.environ, "PATH": f"{Path(program).parent}:{os.environ.get('PATH', '')}"}
    if fresh:
        subprocess.run([*npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, env=variables, check=True)
    with tempfile.TemporaryDirectory() as models:
        model = scripted.write(Path(models) / "scripted")
        started = {
            "demo": (("--enable-request-id-headers",), {}),
            "script": ((), {"model": model}),
            "busy": (("--max-num-seqs", "1", "--max-num-queued-reqs-per-key", "1", "--shutdown-timeout", "0"), {}),
        }
        servers = {}
        try:
            for name, (flags, options) in started.items():
                servers[name] = Server(binary, *flags, **options)
            facts = {"texts": scripted.TEXTS, "lengths": scripted.LENGTHS, "context": scripted.CONTEXT}
            urls = {name: server.url for name, server in servers.items()}
            variables["LONGHAUL_SERVERS"] = json.dumps({"key": KEY, "otherKey": OTHER_KEY, **urls, **facts})
            report = TARGET / "node.xml"
            report.unlink(missing_ok=True)
            command = [
                program,
                "--test",
                "--test-concurrency=1",
                "--test-reporter=junit",
                f"--test-reporter-destination={report}",
            ]
            command += ["--test-reporter=dot", "--test-reporter-destination=stdout"]
            code = subprocess.run([*command, *sorted(map(str, folder.glob("*.test.mjs")))], cwd=folder, env=variables).returncode
        finally:
            codes = {name: server.stop() for name, server in servers.items()}
    out = junit(report, code)
    if any(codes.values()):
        out["failures"].append(f"exit codes of the servers: {codes}")
        out["failed"] += 1
    return out
