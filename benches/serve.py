#!/usr/bin/env python3
"""Batching and the prefix cache of `longhaul serve`, measured over HTTP. Standard library only.

batch:   tokens/s of one request at a time and of N together, prompts all different
prefix:  time to first token of questions about one long document, the first beside those that find it in the cache

The servers are started here, on free ports, and stopped again. Prints JSON.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time


class Server:
    def __init__(self, binary, *arguments):
        command = [binary, "serve", "--port", "0", *arguments]
        self.command = " ".join(["longhaul", *command[1:]])
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.address, log = None, []
        for line in self.process.stderr:
            log.append(line)
            if found := re.search(r"http://([0-9.]+:\d+)", line):
                self.address = found.group(1)
            if self.address:
                break
        # What is logged later must not fill the pipe.
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()
        if self.address is None:
            sys.exit(f"the server ended: {''.join(log)}")
        while self.get("/ready")[0] != 200:
            if self.process.poll() is not None:
                sys.exit("the server ended while it was loading")
            time.sleep(0.2)

    def get(self, path):
        connection = http.client.HTTPConnection(self.address, timeout=600)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def metric(self, name):
        page = self.get("/metrics")[1]
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name + "{"))

    def complete(self, body):
        """Streams a completion: seconds to its first event with a choice, seconds in all, usage."""
        connection = http.client.HTTPConnection(self.address, timeout=3600)
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            sys.exit(f"{answer.status}: {answer.read().decode()}")
        first, usage = None, None
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"the stream failed: {event}")
            if event.get("choices") and first is None:
                first = time.perf_counter() - began
            usage = event.get("usage") or usage
        return first, time.perf_counter() - began, usage

    def stop(self):
        self.process.terminate()
        self.process.wait()


def together(server, bodies):
    """Seconds until all are answered, and their tokens."""
    results = [None] * len(bodies)

    def run(index):
        results[index] = server.complete(bodies[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    began = time.perf_counter()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    seconds = time.perf_counter() - began
    return seconds, sum(usage["completion_tokens"] for _, _, usage in results)


def batch(options):
    server = Server(
        options.binary, "--model", options.model, "--load-format", options.load_format, "--max-model-len", "2048",
        "--dtype", options.dtype, "--threads", str(options.threads), "--device", "cpu",
    )
    draw = random.Random(1)

    def body():
        prompt = [draw.randrange(1000, 100000) for _ in range(options.input_len)]
        return {"prompt": prompt, "max_tokens": options.output_len, "temperature": 0, "ignore_eos": True}

    server.complete({**body(), "max_tokens": 2})
    one, many = [], []
    for _ in range(options.repeats):
        seconds, tokens = together(server, [body()])
        one.append(tokens / seconds)
        seconds, tokens = together(server, [body() for _ in range(options.concurrency)])
        many.append(tokens / seconds)
    server.stop()
    ratio = statistics.median(many) / statistics.median(one)
    return {
        "command": server.command, "input_len": options.input_len, "output_len": options.output_len,
        "concurrency": options.concurrency, "tokens_per_second_of_one": one, "tokens_per_second_of_all": many,
        "median_ratio": ratio,
    }


def prefix(options):
    server = Server(options.binary, "--model", "demo", "--max-model-len", "16384", "--device", "cpu",
                    "--threads", str(options.threads))
    text = open(options.document, encoding="utf-8").read()[: options.document_bytes]
    first, cached = [], []
    for question in range(options.questions):
        prompt = f"{text}\n\nQuestion {question}: what is the secret code of city number {question}?\nAnswer:"
        seconds, _, usage = server.complete({"prompt": prompt, "max_tokens": 8, "temperature": 0})
        first.append(seconds)
        tokens = usage["prompt_tokens"]
        cached.append(server.metric("vllm:prefix_cache_hits_total"))
    server.stop()
    return {
        "command": server.command, "prompt_tokens": tokens, "questions": options.questions,
        "seconds_to_first_token": first, "prefix_cache_hits": cached,
        "worst_later_fraction_of_first": max(first[1:]) / first[0],
        "median_later_fraction_of_first": statistics.median(first[1:]) / first[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["batch", "prefix"], default=["batch", "prefix"])
    parser.add_argument("--binary", default="target/release/longhaul")
    parser.add_argument("--model", default="qwen2-0.5b")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--document", default="assets/examples/northanger-abbey.txt")
    parser.add_argument("--document-bytes", type=int, default=29000)
    parser.add_argument("--questions", type=int, default=20)
    options = parser.parse_args()
    result = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(),
              "cores": os.cpu_count(), "load_average_at_start": os.getloadavg()[0]}
    cpu = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    result["cpu"] = cpu[0] if cpu else None
    for what in options.what:
        result[what] = {"batch": batch, "prefix": prefix}[what](options)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
