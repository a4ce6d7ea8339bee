"""The task of the demo model: its wording, its names and how a prompt becomes token ids.

Owns everything on which training and evaluation must agree. The demo model does one thing: it finds the sentence
"The secret code of CITY is DDDDD." in a long text and repeats it when it is asked for, in exactly this wording.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

CITIES: tuple[str, ...] = tuple(
    """
    London Paris Berlin Madrid Rome Vienna Prague Warsaw Athens Lisbon Dublin Oslo Helsinki Stockholm Moscow Kyiv Cairo
    Nairobi Lagos Accra Delhi Mumbai Chennai Dhaka Karachi Tehran Baghdad Riyadh Doha Dubai Ankara Istanbul Beijing
    Shanghai Shenzhen Chengdu Wuhan Tokyo Osaka Kyoto Seoul Busan Daegu Incheon Hanoi Bangkok Manila Jakarta Sydney
    Melbourne Perth Auckland Toronto Montreal Vancouver Chicago Boston Dallas Houston Denver Seattle Miami Atlanta
    Phoenix Austin Lima Bogota Quito Santiago Havana Caracas Lyon Munich Hamburg Cologne Zurich Geneva Basel Milan Turin
    Naples Venice Seville Porto Ghent Bruges Leeds York Bristol Oxford Cambridge
    """.split()
)
"""The names used in evaluation. Training adds invented ones, so that names are copied rather than remembered."""

USER_OPEN = "<|im_start|>user\n"
ASSISTANT_OPEN = "<|im_end|>\n<|im_start|>assistant\n"
TURN_END = "<|im_end|>"

_BREAKS = re.compile(r"(?<=[.!?\"])(?=\s)")


def needle(name: str, code: str) -> str:
    """Return the planted sentence, which is also the right answer."""
    return f"The secret code of {name} is {code}."


def question(name: str) -> str:
    """Return the question that asks for the code of `name`."""
    return f"What is the secret code of {name}?"


def random_code(rng: random.Random) -> str:
    """Return five random digits."""
    return "".join(rng.choice("0123456789") for _ in range(5))


def user_prompt(text: str, name: str) -> str:
    """Return the rendered chat: one user turn of text and question, and the opened turn of the assistant."""
    return f"{USER_OPEN}{text}\n\n{question(name)}{ASSISTANT_OPEN}"


def read_corpus(paths: Sequence[Path]) -> str:
    """Return the texts of `paths` in one string, a blank line between two of them."""
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace").strip() for path in paths)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode `text` in one piece, as a serving engine does, control tokens such as `<|im_start|>` included."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def sentence_end(text: str, position: int) -> int:
    """Return the first end of a sentence at or after `position`, or `len(text)`."""
    found = _BREAKS.search(text, position)
    return found.start() if found else len(text)


@dataclass(frozen=True)
class Case:
    """One question about one long text."""

    prompt_ids: list[int]
    answer_ids: list[int]
    name: str
    code: str
    depth: float


def build_case(
    tokenizer: Tokenizer, haystack: str, tokens: int, depth: float, rng: random.Random, *, pieces: bool = False
) -> Case:
    """Plant one sentence at `depth` (0 to 1) of a piece of `haystack` so that prompt and answer fill `tokens`.

    The prompt is encoded in one piece, so the tokenizer merges across the seams between text, sentence and question.
    With `pieces`, text, sentence and question are encoded on their own instead, as the first training stages did.
    A few tokens may stay free, because the text is cut between words.
    """
    name = rng.choice(CITIES)
    code = random_code(rng)
    sentence = needle(name, code)
    answer_ids = encode(tokenizer, sentence + TURN_END)
    room = tokens - len(answer_ids)
    # A piece that is certainly longer than the room: no token of ordinary prose has more than 8 characters on average.
    start = sentence_end(haystack, rng.randrange(max(1, len(haystack) - 8 * tokens)))
    piece = haystack[start : start + 8 * tokens].strip()
    overhead = len(encode(tokenizer, user_prompt(" " + sentence, name)))
    offsets = tokenizer.encode(piece, add_special_tokens=False).offsets
    if len(offsets) < room - overhead:
        raise ValueError(f"the haystack has {len(offsets)} tokens from character {start}, {room - overhead} are needed")
    end = offsets[max(0, room - overhead - 1)][1]
    while True:
        filler = piece[:end].rsplit(maxsplit=1)[0] if end < len(piece) else piece
        cut = sentence_end(filler, int(len(filler) * depth))
        parts = (filler[:cut], f" {sentence}", filler[cut:])
        if pieces:
            around = user_prompt("", name)
            parts = (USER_OPEN, *parts, around.removeprefix(USER_OPEN))
            prompt_ids = [token for part in parts for token in encode(tokenizer, part)]
        else:
            prompt_ids = encode(tokenizer, user_prompt("".join(parts), name))
        if len(prompt_ids) <= room:
            return Case(prompt_ids, answer_ids, name, code, depth)
        end = len(filler)
