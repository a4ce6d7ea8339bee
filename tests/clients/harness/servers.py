"""Servers on free ports: `longhaul serve`, unmodified, as its users start it."""

import os
import re
import subprocess
import threading
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
GOLDENS = REPOSITORY / "tests/fixtures/goldens"
KEY = "clients-test-key"
OTHER_KEY = "clients-other-key"


class Server:
    """A server that is ready, until `stop`."""

    def __init__(self, binary: str, *flags: str, model: str | Path = "demo", name: str | None = None, keys: bool = True):
        name = name or Path(model).name
        command = [binary, "serve", "--model", str(model), "--port", "0", "--device", "cpu", "--dtype", "float32", *flags]
        if "--served-model-name" not in flags:
            command += ["--served-model-name", name]
        # Nothing of the caller's environment may choose keys or models.
        environment = {"PATH": os.environ.get("PATH", "")}
        if keys:
            environment |= {"LONGHAUL_API_KEY": KEY, "VLLM_API_KEY": OTHER_KEY}
        self.model = name
        self.log: list[str] = []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        url = None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on (http://[^,]+),", line):
                url = found.group(1)
            if " ready: " in line:
                break
        if url is None or self.process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {self.process.wait()}:\n{''.join(self.log)}")
        self.url = url
        # A pipe that nobody reads would stop the server at some point.
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample of `/metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            page = response.read().decode()
        for line in page.splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{key}="{text}"' in head for key, text in labels.items()):
                return float(value)
        raise KeyError(f"{name} {labels} is not in /metrics")

    def outcomes(self, outcome: str) -> float:
        """Requests that ended in `outcome`."""
        return self.metric("longhaul_requests_finished_total", outcome=outcome)

    def stop(self) -> int:
        """End the server as its supervisor would; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)
