"""Train the demo model: a one-million-parameter Qwen2 that finds a planted code in a long text.

Training goes through stages of growing length, at most 768 tokens, with plain RoPE; everything beyond is the work of
Dual Chunk Attention at inference. A sample is a piece of the corpus with one to eight sentences "The secret code of
CITY is DDDDD." planted in it, and up to four questions as chat turns. It is encoded in one piece, as a serving engine
encodes a prompt. The answers weigh ten times as much as the mean of all tokens.

A run on one CPU thread takes about an hour. `--smoke` proves in a minute that the script works.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate import DEFAULT_HAYSTACK, DEFAULT_MODEL, REPOSITORY, evaluate
from safetensors.torch import save_file
from task import (
    ASSISTANT_OPEN,
    CITIES,
    TURN_END,
    USER_OPEN,
    encode,
    needle,
    question,
    random_code,
    read_corpus,
    sentence_end,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

# Qwen2's split pattern: digits one at a time, a word with the character before it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 1_500
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PADDING = "<|endoftext|>"
DEFAULT_STAGES = "96x48x800,192x24x700,384x12x700,768x6x1200"
SMOKE_STAGES = "96x16x60"
SMOKE_LOSS_RATIO = 0.9
STATE_FILE = "training_state.pt"
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps on batches of `batch` samples of at most `length` tokens."""

    length: int
    batch: int
    steps: int


def parse_stages(text: str) -> list[Stage]:
    """Parse "LENGTHxBATCHxSTEPS,..."."""
    stages = []
    for part in text.split(","):
        try:
            length, batch, steps = (int(number) for number in part.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{part}' is not LENGTHxBATCHxSTEPS") from None
        if length < 96 or batch < 1 or steps < 1:
            raise argparse.ArgumentTypeError(f"'{part}': length must be at least 96, batch and steps at least 1")
        stages.append(Stage(length, batch, steps))
    return stages


def train_tokenizer(corpus: str) -> Tokenizer:
    """Train a byte-level BPE with Qwen2's normalizer and split pattern on the corpus and the task's sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [f"{needle(city, '12345')} {question(city)} user assistant system" for city in CITIES] * 60
    tokenizer.train_from_iterator([corpus, *sentences], trainer)
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    return tokenizer


class Sampler:
    """Makes training samples from a corpus."""

    def __init__(self, tokenizer: Tokenizer, corpus: str, rng: random.Random) -> None:
        """Keep the corpus as text: every sample is encoded as a whole."""
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.rng = rng
        self.padding = tokenizer.token_to_id(PADDING)
        self.characters_per_token = len(corpus) / len(encode(tokenizer, corpus))

    def _name(self) -> str:
        """Return a city, or in three of ten cases an invented name."""
        if self.rng.random() < 0.7:
            return self.rng.choice(CITIES)
        return self._invented_word().capitalize()

    def _invented_word(self) -> str:
        syllables = self.rng.randint(2, 3)
        return "".join(self.rng.choice("bcdfghjklmnprstvwz") + self.rng.choice("aeiou") for _ in range(syllables))

    def _filler(self, characters: int) -> str:
        """Return a piece of the corpus, or in one of ten cases invented words."""
        if self.rng.random() < 0.1:
            words = (self._invented_word() for _ in range(characters // 4))
            return " ".join(words)[:characters]
        start = self.rng.randrange(max(1, len(self.corpus) - characters))
        return self.corpus[start : start + characters]

    def _plant(self, filler: str, sentences: Sequence[str]) -> str:
        """Insert the sentences at random places: mostly after a sentence, else between two words."""
        places = []
        for _ in sentences:
            place = self.rng.randint(0, len(filler))
            if self.rng.random() < 0.6:
                place = sentence_end(filler, place)
            else:
                space = filler.find(" ", place)
                place = len(filler) if space < 0 else space
            places.append(place)
        parts, done = [], 0
        for place, sentence in zip(sorted(places), sentences, strict=True):
            before = self.rng.choice((" ", " ", " ", "\n", "\n\n")) if place else ""
            parts += [filler[done:place], before, sentence]
            done = place
        return "".join(parts) + filler[done:]

    def sample(self, length: int) -> tuple[list[int], list[float], list[float]]:
        """Return `length` + 1 ids with, per id, 1.0 where it belongs to an answer, and 1.0 where it is no padding."""
        count = min(self.rng.choice((1, 2, 3, 4, 6, 8)), max(1, length // 48 - 1))
        codes: dict[str, str] = {}
        while len(codes) < count:
            codes.setdefault(self._name(), random_code(self.rng))
        sentences = [needle(name, code) for name, code in codes.items()]
        asked = self.rng.sample(sorted(codes.items()), min(count, 4, max(1, length // 96)))
        turns: list[tuple[str, str]] = []
        for index, (name, code) in enumerate(asked):
            opening = "\n\n" if index == 0 else "\n" + USER_OPEN
            turns.append((opening + question(name) + ASSISTANT_OPEN, needle(name, code) + TURN_END))
        tail = "".join(asking + answer for asking, answer in turns)
        overhead = len(encode(self.tokenizer, USER_OPEN + " ".join(sentences) + tail))
        characters = max(0, int((length - overhead) * self.characters_per_token))
        filler = self._filler(characters)
        while True:
            body = USER_OPEN + self._plant(filler, sentences)
            encoding = self.tokenizer.encode(body + tail, add_special_tokens=False)
            excess = len(encoding.ids) - (length + 1)
            if excess <= 0:
                break
            if not filler:  # many long names in a short sample
                return self.sample(length)
            filler = filler[: max(0, len(filler) - int(excess * self.characters_per_token) - 8)]
        spans, position = [], len(body)
        for asking, answer in turns:
            position += len(asking)
            spans.append((position, position + len(answer)))
            position += len(answer)
        answers = [
            float(any(start < span_end and end > span_start for span_start, span_end in spans))
            for start, end in encoding.offsets
        ]
        padding = length + 1 - len(encoding.ids)
        real = [1.0] * len(encoding.ids) + [0.0] * padding
        return encoding.ids + [self.padding] * padding, answers + [0.0] * padding, real

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, answer weights and padding mask, each [batch, length + 1]."""
        ids, answers, real = zip(*(self.sample(stage.length) for _ in range(stage.batch)), strict=True)
        return torch.tensor(ids), torch.tensor(answers), torch.tensor(real)


def schedule(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Return the stage of every step."""
    for stage in stages:
        for _ in range(stage.steps):
            yield stage


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return a linear warm-up over 100 steps (a tenth of a short run), then a cosine to a twentieth of `peak`."""
    warm_up = min(1.0, (step + 1) / min(100, max(1, total // 10)))
    return peak * warm_up * (0.475 * (1 + math.cos(math.pi * step / total)) + 0.05)


def save_checkpoint(
    folder: Path,
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    step: int,
    rng: random.Random,
) -> None:
    """Write the checkpoint in the published layout (bf16, tied head left out), and the state that resumes training."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in COPIED_FILES:
        if (DEFAULT_MODEL / name).resolve() != (folder / name).resolve():
            shutil.copyfile(DEFAULT_MODEL / name, folder / name)
    state = {"step": step, "weights": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.getstate()}
    partial = folder / (STATE_FILE + ".partial")
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def train(arguments: argparse.Namespace) -> list[float]:
    """Train, save and return the loss of every step."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    corpus = read_corpus(arguments.corpus)
    if arguments.train_tokenizer:
        tokenizer = train_tokenizer(corpus)
    else:
        tokenizer = Tokenizer.from_file(str((arguments.resume or DEFAULT_MODEL) / "tokenizer.json"))
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(DEFAULT_MODEL))
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    first_step = 0
    if arguments.resume and (arguments.resume / STATE_FILE).exists():
        state = torch.load(arguments.resume / STATE_FILE, weights_only=True)
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        version, words, gauss = state["rng"]
        rng.setstate((version, tuple(words), gauss))
        first_step = state["step"]
    elif arguments.resume:
        weights = Qwen2ForCausalLM.from_pretrained(arguments.resume, dtype=torch.float32)
        model.load_state_dict(weights.state_dict())
    sampler = Sampler(tokenizer, corpus, rng)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, corpus of {len(corpus):,} "
        f"characters, {sampler.characters_per_token:.2f} characters a token"
    )

    total = sum(stage.steps for stage in arguments.stages)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, stage in enumerate(schedule(arguments.stages)):
        if step < first_step:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, arguments.learning_rate)
        ids, answers, real = sampler.batch(stage)
        targets, answer_weights, real_weights = ids[:, 1:], answers[:, 1:], real[:, 1:]
        # Padding stands at the end, so causal attention hides it from every counted token.
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        token_losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        token_losses = token_losses.view_as(answer_weights)
        answer_loss = (token_losses * answer_weights).sum() / answer_weights.sum()
        text_loss = (token_losses * real_weights).sum() / real_weights.sum()
        loss = answer_loss + 0.1 * text_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % arguments.report_every == 0 or step + 1 == total:
            right = ((logits.argmax(-1) == targets).float() * answer_weights).sum() / answer_weights.sum()
            print(
                f"step {step + 1}/{total}, {stage.length} tokens: loss {loss.item():.3f} (answers "
                f"{answer_loss.item():.3f}, text {text_loss.item():.3f}), answer tokens right {right.item():.1%}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        if (step + 1) % arguments.save_every == 0 or step + 1 == total:
            save_checkpoint(arguments.out, model, tokenizer, optimizer, step + 1, rng)
    if not losses:
        raise SystemExit(f"nothing to do: {arguments.resume} is at step {first_step} of {total}")
    return losses


def check_smoke(losses: Sequence[float], folder: Path) -> None:
    """Stop unless the loss fell and the checkpoint reloads to finite logits."""
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    if not last < SMOKE_LOSS_RATIO * first:
        raise SystemExit(f"smoke: the loss went from {first:.3f} to {last:.3f}, expected a fall by a tenth at least")
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    saved = torch.load(folder / STATE_FILE, weights_only=True)["weights"]
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, saved[name].to(torch.bfloat16).float()):
            raise SystemExit(f"smoke: tensor {name} in {folder} is not what was trained, rounded to bf16")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.inference_mode():
        logits = model(torch.tensor([encode(tokenizer, needle("Lisbon", "48213"))])).logits
    if not bool(logits.isfinite().all()):
        raise SystemExit("smoke: the reloaded checkpoint gives logits that are not finite")
    print(f"smoke: ok, the loss went from {first:.3f} to {last:.3f} and the checkpoint reloads")


def default_corpus() -> list[Path]:
    """Return the shipped haystack and the project's own documentation."""
    return [DEFAULT_HAYSTACK, *sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("**/*.md"))]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", help="plain texts (default: the haystack and the docs)")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (required without --smoke)")
    parser.add_argument(
        "--stages", type=parse_stages, help=f"LENGTHxBATCHxSTEPS,... (default: {DEFAULT_STAGES})", metavar="STAGES"
    )
    parser.add_argument(
        "--steps", type=int, help="train this many steps in all: the stages are shortened in proportion"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: 2e-3; fine-tuning: 3e-4)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help=f"go on where this run stopped; without {STATE_FILE} in the folder, start anew from its weights",
    )
    parser.add_argument("--train-tokenizer", action="store_true", help="train a tokenizer instead of the shipped one")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two checkpoints (default: 200)")
    parser.add_argument("--report-every", type=int, default=20, help="steps between two reports (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a run of a minute that proves that the script works")
    parser.add_argument("--evaluate", action="store_true", help="measure the trained checkpoint at the end")
    arguments = parser.parse_args(argv)
    if not arguments.out and not arguments.smoke:
        parser.error("--out is required without --smoke")
    arguments.corpus = arguments.corpus or default_corpus()
    arguments.stages = arguments.stages or parse_stages(SMOKE_STAGES if arguments.smoke else DEFAULT_STAGES)
    total = sum(stage.steps for stage in arguments.stages)
    if arguments.steps:
        arguments.stages = [
            Stage(stage.length, stage.batch, max(1, round(stage.steps * arguments.steps / total)))
            for stage in arguments.stages
        ]
        total = sum(stage.steps for stage in arguments.stages)
    if arguments.smoke and total < 20:
        parser.error("--smoke compares the first ten steps with the last ten: give at least 20")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says."""
    arguments = parse_arguments(argv)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        arguments.out = arguments.out or Path(scratch)
        losses = train(arguments)
        if arguments.smoke:
            check_smoke(losses, arguments.out)
        if arguments.evaluate:
            model = Qwen2ForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
            tokenizer = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
            haystack = read_corpus([DEFAULT_HAYSTACK])
            for mode in ("none", "dca"):
                for tokens in (768, 3072):
                    score = evaluate(model, tokenizer, haystack, mode, tokens, cases=10, seed=0)
                    print(f"{mode:>5} {tokens:>6} tokens: {score.found}/{score.cases}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
