"""Time transformers' Qwen2 on the CPU: the baseline that `longhaul bench latency` is compared with.

The model has the shape of Qwen2-0.5B and random weights (speed does not depend on their values), so nothing is
downloaded. One repetition is a prefill of the prompt, with the logits of its last token only, as `generate` computes
them, followed by greedy decoding of one token at a time over the key-value cache. The median of the repetitions after
a warm-up is reported, as JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """Medians over `repeats` repetitions, and every single one of them."""

    dtype: str
    repeats: int
    prefill_tok_s: float
    decode_tok_s: float
    prefill_s: list[float]
    decode_s: list[float]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default: 512)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens decoded after the prompt (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions, at least 3 (default: 5)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the prompt (default: 0)")
    arguments = parser.parse_args(argv)
    for name, least in (("threads", 1), ("input_len", 1), ("output_len", 1), ("repeats", 3)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return arguments


def measure(dtype_name: str, arguments: argparse.Namespace) -> Measurement:
    """Build the model in `dtype_name` and time prefill and decode."""
    import torch
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(arguments.seed)
    dtype = getattr(torch, dtype_name)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    config._attn_implementation = "sdpa"
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    prompt = torch.randint(0, 151_000, (1, arguments.input_len))

    prefill_seconds: list[float] = []
    decode_seconds: list[float] = []
    with torch.inference_mode():
        for repetition in range(arguments.repeats + 1):
            cache = DynamicCache(config=config)
            start = time.perf_counter()
            logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            prefilled = time.perf_counter()
            for _ in range(arguments.output_len):
                logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                token = logits[:, -1:].argmax(-1)
            decoded = time.perf_counter()
            cached = cache.get_seq_length()
            if cached != arguments.input_len + arguments.output_len:
                raise RuntimeError(
                    f"the cache holds {cached} tokens, expected {arguments.input_len + arguments.output_len}"
                )
            if repetition > 0:  # the first one is the warm-up
                prefill_seconds.append(prefilled - start)
                decode_seconds.append(decoded - prefilled)
            print(
                f"{dtype_name} {'warm-up' if repetition == 0 else repetition}: prefill {prefilled - start:.3f} s, "
                f"decode {decoded - prefilled:.3f} s",
                file=sys.stderr,
                flush=True,
            )
    return Measurement(
        dtype=dtype_name,
        repeats=arguments.repeats,
        prefill_tok_s=arguments.input_len / statistics.median(prefill_seconds),
        decode_tok_s=arguments.output_len / statistics.median(decode_seconds),
        prefill_s=prefill_seconds,
        decode_s=decode_seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every requested dtype and print one JSON object."""
    arguments = parse_arguments(argv)
    # Read by OpenMP and MKL when torch is imported, which is why the imports stand inside the functions.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["MKL_NUM_THREADS"] = str(arguments.threads)
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    measurements = [measure(dtype, arguments) for dtype in arguments.dtypes]
    report = {
        "engine": "transformers",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "model": "qwen2-0.5b",
        "threads": arguments.threads,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "attention": "sdpa",
        "results": {measurement.dtype: asdict(measurement) for measurement in measurements},
    }
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
