"""Measure the demo model: does it find the planted code, at which length, with and without Dual Chunk Attention?

Computes in float32 with plain torch operations, independently of Longhaul's own kernels. A case counts as found when
every token of the right answer, its end of turn included, is the arg-max after the true prompt and the tokens before
it, which is the case exactly when greedy decoding produces this answer and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from task import build_case, read_corpus
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = REPOSITORY / "assets" / "demo"
DEFAULT_HAYSTACK = REPOSITORY / "assets" / "haystack.txt"
TRAINED_WINDOW = 768
LOCAL_SIZE = 128
QUERY_ROWS = 512
"""Rows of the score matrix held at a time."""


@dataclass(frozen=True)
class Positions:
    """How positions enter attention: plain RoPE, or Dual Chunk Attention (An et al. 2024, arXiv:2402.17463)."""

    chunk_size: int | None = None
    local_size: int = 0
    length_scale_from: int | None = None
    """Trained window O of the length scale max(1, 0.1 ln((i+1)/O) + 1), squared on the logits of query i."""

    @property
    def period(self) -> int | None:
        """Return L = chunk_size - local_size, after which the positions of the keys start over."""
        return None if self.chunk_size is None else self.chunk_size - self.local_size


MODES: dict[str, Positions] = {
    "none": Positions(),
    "dca": Positions(TRAINED_WINDOW, LOCAL_SIZE, TRAINED_WINDOW),
}


def rotate(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotate `x` [heads, tokens, head_dim] to `positions` [tokens] (RoPE, halves convention)."""
    angles = positions[:, None].float() * inverse_frequencies[None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, mode: Positions, inverse_frequencies: Tensor
) -> Tensor:
    """Return the causal attention of `query` [heads, rows, d] at positions `rows` over all of `key` [heads, n, d].

    `key` is not rotated yet; heads of keys and values are already repeated for their group.
    """
    heads, _, head_dim = query.shape
    count = key.shape[1]
    out = torch.empty(heads, len(rows), head_dim)
    period = mode.period or count
    places = torch.arange(count)
    rotated_key = rotate(key, places % period, inverse_frequencies)
    begin = 0
    while begin < len(rows):
        first = int(rows[begin])
        chunk = first // period
        # Rows of one chunk only, so that the three ranges of keys are contiguous.
        end = min(begin + QUERY_ROWS, len(rows), begin + (chunk + 1) * period - first)
        block, current = query[:, begin:end], rows[begin:end]
        last = int(current[-1]) + 1
        own, previous = chunk * period, max(0, (chunk - 1) * period)
        parts = []
        if mode.chunk_size is not None:
            limit = mode.chunk_size
            if previous > 0:  # chunks before the previous one: one constant distance
                inter = torch.full_like(current, min(2 * period - 1, limit))
                parts.append(rotate(block, inter, inverse_frequencies) @ rotated_key[:, :previous].mT)
            if own > 0:  # the previous chunk: true distances as far as the table reaches
                successive = torch.clamp(current % period + period, max=limit)
                parts.append(rotate(block, successive, inverse_frequencies) @ rotated_key[:, previous:own].mT)
        parts.append(rotate(block, current % period, inverse_frequencies) @ rotated_key[:, own:last].mT)
        scores = torch.cat(parts, dim=-1).mul_(head_dim**-0.5)
        if mode.length_scale_from is not None:
            scale = torch.clamp(0.1 * torch.log((current + 1).float() / mode.length_scale_from) + 1, min=1)
            scores.mul_(scale.square()[:, None])
        scores.masked_fill_(places[None, :last] > current[:, None], -math.inf)
        out[:, begin:end] = scores.softmax(-1) @ value[:, :last]
        begin = end
    return out


@torch.inference_mode()
def last_logits(model: Qwen2ForCausalLM, ids: Sequence[int], keep: int, mode: Positions) -> Tensor:
    """Return the logits [keep, vocabulary] of the last `keep` tokens of `ids`."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    inverse_frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    hidden = model.model.embed_tokens(torch.tensor(ids))
    rows = torch.arange(len(ids))
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        if index == config.num_hidden_layers - 1:  # the last layer's output is needed for the last rows only
            rows, hidden = rows[-keep:], hidden[-keep:]
        projections = layer.self_attn

        def heads(projected: Tensor) -> Tensor:
            return projected.view(len(projected), -1, head_dim).transpose(0, 1)

        query = heads(projections.q_proj(normed[-len(rows) :]))
        key = heads(projections.k_proj(normed)).repeat_interleave(group, dim=0)
        value = heads(projections.v_proj(normed)).repeat_interleave(group, dim=0)
        mixed = attention(query, key, value, rows, mode, inverse_frequencies)
        hidden = hidden + projections.o_proj(mixed.transpose(0, 1).reshape(len(rows), -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return functional.linear(model.model.norm(hidden), model.lm_head.weight)


@dataclass(frozen=True)
class Score:
    """Cases found at one length in one mode."""

    mode: str
    tokens: int
    cases: int
    found: int
    missed_depths: list[float]


def evaluate(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    haystack: str,
    mode: str,
    tokens: int,
    cases: int,
    seed: int,
    *,
    pieces: bool = False,
) -> Score:
    """Ask `cases` questions about texts of `tokens` tokens, the sentence at evenly spaced depths."""
    rng = random.Random(f"{seed}/{tokens}")  # the same cases for every mode and every checkpoint
    missed = []
    for index in range(cases):
        case = build_case(tokenizer, haystack, tokens, (index + 0.5) / cases, rng, pieces=pieces)
        ids = case.prompt_ids + case.answer_ids[:-1]
        logits = last_logits(model, ids, len(case.answer_ids), MODES[mode])
        if logits.argmax(-1).tolist() != case.answer_ids:
            missed.append(case.depth)
    return Score(mode, tokens, cases, cases - len(missed), missed)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help="checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--haystack", type=Path, nargs="+", default=[DEFAULT_HAYSTACK], help="texts, in UTF-8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[768, 1536, 3072, 6144, 12288], help="in tokens")
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["none", "dca"])
    parser.add_argument("--cases", type=int, default=20, help="questions a length and mode (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--pieces", action="store_true", help="encode text, sentence and question on their own instead of in one piece"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate one checkpoint and print what it found."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    model = Qwen2ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    haystack = read_corpus(arguments.haystack)
    scores = []
    for mode in arguments.modes:
        for tokens in arguments.lengths:
            score = evaluate(
                model,
                tokenizer,
                haystack,
                mode,
                tokens,
                arguments.cases,
                arguments.seed,
                pieces=arguments.pieces,
            )
            scores.append(score)
            if not arguments.json:
                missed = ", ".join(f"{depth:.2f}" for depth in score.missed_depths)
                print(
                    f"{mode:>5} {tokens:>6} tokens: {score.found}/{score.cases}"
                    + (f"  missed at depth {missed}" if missed else ""),
                    flush=True,
                )
    if arguments.json:
        json.dump([asdict(score) for score in scores], sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
