"""schemathesis: requests made up from `/openapi.json`, right and wrong ones, and what it says of the answers."""

import json
import subprocess
import sys
import urllib.request

from harness.packages import TARGET, environment, pip_for, result
from harness.servers import KEY, Server

LEAST = 5000
EXAMPLES = 400  # an operation with a body, besides the systematic cases: some 6,000 together

# Not `positive_data_acceptance`: a schema cannot say what is a matter of several fields, such as that `stream_options` needs
# `stream`.
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
]


def schemathesis(binary: str) -> dict:
    """Over all operations, against the demo with a context so small that no request takes long."""
    packages = pip_for("schemathesis")
    report = TARGET / "schemathesis.json"
    report.unlink(missing_ok=True)
    server = Server(binary, "--max-model-len", "256", "--enable-request-id-headers")
    try:
        program = "from schemathesis.cli import schemathesis; schemathesis()"
        command = [sys.executable, "-c", program, "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing"]
        command += ["--seed", "1", "--generation-database", "none", "--suppress-health-check", "all", "--continue-on-failure"]
        command += ["--no-color", "--report", "json", "--report-json-path", str(report)]
        code = subprocess.run(command, cwd=TARGET, env=environment(packages)).returncode
        statuses = answered(server)
        panics = server.metric("longhaul_panics_total")
    finally:
        exit_code = server.stop()
    if not report.is_file():
        return result(0, [f"schemathesis ended with {code} and no report"])
    run = json.loads(report.read_text())
    generated = run["test_cases"]["generated"]
    failures = [f"{failure.get('operation', '')}: {failure.get('title', failure)}" for failure in run["failures"]]
    failures += [f"error: {error}" for error in run["errors"]]
    if generated < LEAST:
        failures.append(f"only {generated} cases, {LEAST} are wanted")
    failures += [f"{count} answers with status {status}" for status, count in statuses.items() if status >= 500]
    if panics:
        failures.append(f"{panics} handlers panicked")
    if code and not failures:
        failures.append(f"schemathesis ended with {code}")
    if exit_code:
        failures.append(f"the server ended with {exit_code}")
    print(f"answers by status: {statuses}")
    return result(generated - run["test_cases"]["with_failures"], failures, statuses=statuses)


def answered(server: Server) -> dict[int, int]:
    """Answers of the keyed routes by status, as the server counts them."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        page = response.read().decode()
    statuses: dict[int, int] = {}
    for line in page.splitlines():
        if line.startswith("http_requests_total{"):
            status = int(line.partition('code="')[2].partition('"')[0])
            statuses[status] = statuses.get(status, 0) + int(float(line.rpartition(" ")[2]))
    return dict(sorted(statuses.items()))
