#!/usr/bin/env python3
"""What torch reaches at the shapes of `longhaul bench kernels`: one JSON object a line.

Times are medians of replayed CUDA graphs, over operands that together exceed the second-level cache.
"""

import json
import math
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE, BF16 = "cuda", torch.bfloat16
L2_BYTES = 64 << 20


def seconds(work, launches=20, repeats=7):
    """Median seconds of `work(i)`, recorded `launches` times into a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            work(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / launches)
    return statistics.median(times)


def emit(op, model, shape, measure, bytes_moved=0, flops=0, **more):
    record = {"op": op, "model": model, "shape": shape, "bytes": bytes_moved, "flops": flops, **more}
    try:
        time = measure()
        record |= {"microseconds": time * 1e6, "bytes_per_second": bytes_moved / time, "flops_per_second": flops / time}
    except Exception as error:  # one shape must not cost the others
        record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    torch.cuda.empty_cache()
    print(json.dumps(record), flush=True)


def random(*shape, dtype=BF16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def copies(bytes_of_one):
    return max(2, min(64, math.ceil(2 * L2_BYTES / bytes_of_one)))


def limits():
    def copy():
        source = torch.empty(2 << 30, device=DEVICE, dtype=torch.uint8)
        target = torch.empty_like(source)
        return seconds(lambda i: target.copy_(source), launches=5)

    def product():
        a, b = random(8192, 8192), random(8192, 8192)
        return seconds(lambda i: torch.matmul(a, b), launches=5)

    emit("copy", "", "2 GiB", copy, bytes_moved=4 << 30)
    emit("matmul", "", "8192 cube", product, flops=2 * 8192**3)


def attention_prefill(model, heads, kv_heads, head_dim, tokens):
    def measure():
        q = random(1, heads, tokens, head_dim)
        # The flash kernel of every version takes as many K and V heads as query heads.
        k, v = (random(1, kv_heads, tokens, head_dim).repeat_interleave(heads // kv_heads, 1) for _ in range(2))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return seconds(lambda i: F.scaled_dot_product_attention(q, k, v, is_causal=True), launches=3, repeats=5)

    shape = f"1 x {tokens}, {heads}/{kv_heads} x {head_dim}"
    emit("attention_prefill", model, shape, measure, flops=2 * tokens * tokens * heads * head_dim)


def attention_decode(model, heads, kv_heads, head_dim, batch, context):
    kv_bytes = batch * context * 2 * kv_heads * head_dim * 2

    def measure():
        sets = copies(kv_bytes)
        q = random(batch, heads, 1, head_dim)
        k, v = (random(sets, batch, kv_heads, context, head_dim) for _ in range(2))
        return seconds(lambda i: F.scaled_dot_product_attention(q, k[i % sets], v[i % sets], enable_gqa=True))

    shape = f"{batch} x {context}, {heads}/{kv_heads} x {head_dim}"
    emit("attention_decode", model, shape, measure, bytes_moved=kv_bytes, flops=4 * batch * context * heads * head_dim)


def product(model, name, n, k, rows):
    weight_bytes = 2 * n * k

    def measure():
        sets = copies(weight_bytes)
        weights, x = random(sets, n, k), random(rows, k)
        return seconds(lambda i: torch.matmul(x, weights[i % sets].t()))

    moved = weight_bytes + 2 * rows * (n + k)
    emit("linear", model, f"{rows} x {k} -> {n} ({name})", measure, bytes_moved=moved, flops=2 * rows * n * k)


def experts(rows, hidden=3584, count=64, inner=2560, top_k=8):
    """The routed experts of 57B-A14B as a loop over the experts that have rows, and as grouped products where torch has them."""
    gate_up, down = random(count, 2 * inner, hidden), random(count, hidden, inner)
    x = random(rows, hidden)
    chosen = torch.stack([torch.randperm(count, device=DEVICE)[:top_k] for _ in range(rows)])
    order = chosen.flatten().argsort()
    tokens, sizes = order // top_k, torch.bincount(chosen.flatten(), minlength=count).tolist()
    spans, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            spans.append((expert, start, start + size))
        start += size
    moved = len(spans) * 3 * hidden * inner * 2
    flops = rows * top_k * 6 * hidden * inner

    def loop(i):
        gathered = x[tokens]
        for expert, begin, end in spans:
            gate, up = torch.matmul(gathered[begin:end], gate_up[expert].t()).chunk(2, -1)
            gathered[begin:end] = torch.matmul(F.silu(gate) * up, down[expert].t())
        torch.zeros_like(x).index_add_(0, tokens, gathered)

    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)

    def grouped(i):
        gate, up = torch._grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        torch.zeros_like(x).index_add_(0, tokens, out)

    shape = f"{rows} x {hidden}, {count} x {inner}, top {top_k}"
    for how, work in (("loop", loop), ("grouped", grouped)):
        emit("moe_experts", "qwen2-57b-a14b", shape, lambda: seconds(work, launches=3), moved, flops, how=how)


def sampling(rows, vocab=151_936):
    logits = random(rows, vocab, dtype=torch.float32)

    def top_p(i):
        values, indices = (logits / 0.8).sort(descending=True)
        probabilities = values.softmax(-1)
        kept = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities > 0.9, 0)
        noise = torch.empty_like(kept).exponential_()
        indices.gather(-1, (kept / noise).argmax(-1, keepdim=True))

    emit("sample", "", f"{rows} x {vocab}, greedy", lambda: seconds(lambda i: logits.argmax(-1)), 4 * rows * vocab)
    emit("sample", "", f"{rows} x {vocab}, top-p 0.9", lambda: seconds(top_p, launches=3), 4 * rows * vocab)


def main():
    device = torch.cuda.get_device_name()
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "device": device}), flush=True)
    torch.manual_seed(0)
    limits()
    for tokens in (4096, 8192, 16384, 32768):
        attention_prefill("qwen2-7b", 28, 4, 128, tokens)
    attention_decode("qwen2-7b", 28, 4, 128, 8, 32768)
    for rows in (1, 2, 4, 8, 16):
        product("qwen2-7b", "down", 3584, 18944, rows)
        product("qwen2-7b", "gate and up", 2 * 18944, 3584, rows)
        product("qwen2-72b", "down", 8192, 29568, rows)
        product("qwen2-72b", "gate and up", 2 * 29568, 8192, rows)
    for rows in (1, 8, 32, 128):
        experts(rows)
    for rows in (1, 8, 64):
        sampling(rows)


if __name__ == "__main__":
    main()
