"""guidellm: a load generator, with prompts that it makes up from the demo's tokenizer."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.packages import TARGET, environment, pip_for, result
from harness.servers import KEY, REPOSITORY, Server

REQUESTS = 60
PROMPT, OUTPUT = 64, 16
# Route, then what decides when requests come.
RUNS = [
    ("/v1/completions", "kind=concurrent,streams=8"),
    ("/v1/chat/completions", "kind=concurrent,streams=8"),
    ("/v1/completions", "kind=poisson,rate=20"),
    ("/v1/chat/completions", "kind=throughput,max_concurrency=60"),
]


def guidellm(binary: str) -> dict:
    """Each run's requests must all succeed, stream, and have the tokens that were asked for; the server must count the same."""
    packages = pip_for("guidellm")
    server = Server(binary)
    passed, failures = 0, []
    try:
        for route, profile in RUNS:
            name, ended = f"{route} {profile}", server.outcomes("length")
            report = run(packages, server, route, profile)
            if isinstance(report, str):
                failures.append(f"{name}: {report}")
                continue
            (benchmark,) = report["benchmarks"]
            totals, good = benchmark["metrics"]["request_totals"], benchmark["requests"]["successful"]
            right = [request for request in good if request["output_tokens"] == OUTPUT and request["prompt_tokens"] >= PROMPT]
            passed += len(right)
            if not totals["successful"] == totals["total"] == len(right) == REQUESTS:
                failures.append(f"{name}: {totals}, {len(right)} with the tokens asked for, {REQUESTS} wanted")
            if server.outcomes("length") - ended != REQUESTS:
                failures.append(f"{name}: the server counts {server.outcomes('length') - ended} answers")
        if server.metric("longhaul_requests_received_total") != server.outcomes("length"):
            failures.append("requests ended otherwise than by their length")
    finally:
        code = server.stop()
    if code:
        failures.append(f"the server ended with {code}")
    return result(passed, failures)


def run(packages: Path, server: Server, route: str, profile: str) -> dict | str:
    """guidellm's report, or what went wrong."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(TARGET / "hf-home")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "guidellm", "run", "--disable-progress"]
        command += ["--backend", f"kind=openai_http,target={server.url},api_key={KEY},request_format={route}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={REPOSITORY / 'assets/demo'}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}", "--profile", profile]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}", "--output", f"kind=json,path={path}"]
        try:
            code = subprocess.run(command, cwd=folder, env=environment(packages, **offline), timeout=300).returncode
        except subprocess.TimeoutExpired:
            return "guidellm did not end within 300 s"
        if code or not path.is_file():
            return f"guidellm ended with {code}"
        return json.loads(path.read_text())
