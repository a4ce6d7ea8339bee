"""lm_eval: two tasks of ours, so that no data set is downloaded, scored over HTTP and compared with our own command line."""

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from harness.packages import HERE, TARGET, environment, pip_for, result
from harness.servers import KEY, REPOSITORY, Server

TASKS = {"longhaul_codes": ("exact_match,none", 0.9), "longhaul_choices": ("acc,none", 1.0)}
TOLERANCE = 2e-3  # of a sum of six log probabilities in float32


def lm_eval(binary: str) -> dict:
    """`local-completions`: generate_until and loglikelihood."""
    packages = pip_for("lm_eval")
    server = Server(binary)
    try:
        with tempfile.TemporaryDirectory() as out:
            arguments = f"model=demo,base_url={server.url}/v1/completions,tokenizer={REPOSITORY / 'assets/demo'}"
            arguments += ",num_concurrent=4,max_length=2048"
            command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
            command += [
                "--tasks",
                ",".join(TASKS),
                "--include_path",
                ".",
                "--batch_size",
                "2",
                "--log_samples",
                "--output_path",
                out,
            ]
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(TARGET / "hf-home")}
            variables = environment(packages, OPENAI_API_KEY=KEY, **offline)
            code = subprocess.run(command, cwd=HERE / "lm_eval", env=variables).returncode
            results = [json.loads(path.read_text()) for path in Path(out).rglob("results_*.json")]
            samples = {
                task: [
                    json.loads(line)
                    for path in Path(out).rglob(f"samples_{task}_*.jsonl")
                    for line in path.read_text().splitlines()
                ]
                for task in TASKS
            }
        if code or not results:
            return result(0, [f"lm_eval ended with {code}"])
        passed, failures = 0, []
        scores = {}
        for task, (metric, least) in TASKS.items():
            scores[task] = results[0]["results"][task][metric]
            if scores[task] < least:
                failures.append(f"{task}: {metric} is {scores[task]}, at least {least} is expected")
        own = Command(binary, server)
        for failure in [
            *(own.generation(sample) for sample in samples["longhaul_codes"]),
            *own.likelihoods(samples["longhaul_choices"]),
        ]:
            if failure is None:
                passed += 1
            else:
                failures.append(failure)
    finally:
        code = server.stop()
    if code:
        failures.append(f"the server ended with {code}")
    print(f"scores: {scores}; {passed} answers equal those of the command line")
    return result(passed, failures, scores=scores)


class Command:
    """Our command line, which shares no HTTP, no batches and no sampler of probabilities with the server."""

    def __init__(self, binary: str, server: Server):
        self.binary, self.server = binary, server

    def tokens(self, text: str) -> list[int]:
        body = json.dumps({"prompt": text}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.server.url}/tokenize", body, headers)) as response:
            return json.load(response)["tokens"]

    def run(self, command: str, ids: list[int], *more: str) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(ids, file)
            file.flush()
            arguments = [self.binary, command, "--device", "cpu", "--dtype", "float32", "--ids-file", file.name, *more]
            return subprocess.run(arguments, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout

    def generation(self, sample: dict) -> str | None:
        """What is wrong with a sample of generate_until."""
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        options = ("--temperature", "0", "--max-tokens", "40", "--stop", "\n", "--json")
        expected = json.loads(self.run("generate", self.tokens(prompt), *options))["text"]
        (got,) = sample["resps"][0]
        return None if got == expected else f"{sample['doc']['city']}: lm_eval got {got!r}, the command line {expected!r}"

    def likelihoods(self, samples: list[dict]):
        """What is wrong with the right choice of each sample, and with one wrong choice."""
        for sample in samples:
            choices = sample["doc"]["choices"]
            right = choices.index(sample["doc"]["code"])
            for choice in (right, (right + 1) % len(choices)):
                arguments = sample["arguments"][f"gen_args_{choice}"]
                likelihood, greedy = sample["filtered_resps"][choice]
                expected, best = self.score(arguments["arg_0"], arguments["arg_1"])
                same = abs(float(likelihood) - expected) <= TOLERANCE and str(greedy) == str(best)
                got = f"lm_eval got {likelihood} ({greedy}), the logits give {expected} ({best})"
                yield None if same else f"{sample['doc']['city']} {choices[choice]}: {got}"

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """The log likelihood of a continuation, and whether greedy decoding gives it, from `longhaul logits`."""
        ids = self.tokens(context + continuation)
        begin = len(self.tokens(context))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logits.safetensors"
            self.run("logits", ids, "--out", str(path))
            data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        width = json.loads(data[8 : 8 + length])["logits"]["shape"][1]
        flat = memoryview(data[8 + length :]).cast("f")
        total, greedy = 0.0, True
        for at in range(begin, len(ids)):
            row = flat[(at - 1) * width : at * width].tolist()
            top = max(row)
            total += row[ids[at]] - top - math.log(sum(math.exp(value - top) for value in row))
            greedy &= row[ids[at]] == top
        return total, greedy
