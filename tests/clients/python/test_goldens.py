"""The golden checkpoints through HTTP: what transformers computes in float64 is what clients get."""

import asyncio
import json
import math
import struct

import openai
import pytest
from calls import collect, complete
from conftest import client, start
from harness.servers import GOLDENS, KEY

CASES = sorted(path.name for path in GOLDENS.iterdir() if (path / "golden.safetensors").is_file())


class Golden:
    """A prompt, the logits after each of its tokens, and the greedy continuation."""

    def __init__(self, path):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])

        def tensor(name, code):
            begin, end = header[name]["data_offsets"]
            return list(memoryview(data[8 + length + begin : 8 + length + end]).cast(code))

        self.ids, self.greedy, flat = tensor("input_ids", "q"), tensor("greedy", "q"), tensor("logits", "f")
        width = header["logits"]["shape"][-1]
        self.logits = [flat[at : at + width] for at in range(0, len(flat), width)]

    def scores(self):
        """Log probabilities of the prompt's tokens, from the second on."""
        for row, id in zip(self.logits, self.ids[1:], strict=False):
            top = max(row)
            yield row[id] - top - math.log(sum(math.exp(value - top) for value in row))


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    directory = GOLDENS / request.param
    server = start(model=directory)
    server.sdk = client(server)
    server.golden = Golden(directory / "golden.safetensors")
    yield server
    assert server.stop() == 0


def greedy(server, **more):
    body = {"ignore_eos": True, "return_token_ids": True}
    return {"prompt": server.golden.ids, "max_tokens": len(server.golden.greedy), "extra_body": body, **more}


def test_greedy(golden):
    assert complete(golden, **greedy(golden)).choices[0].token_ids == golden.golden.greedy


def test_greedy_streamed_by_a_crowd(golden):
    async def one(sdk):
        stream = await sdk.completions.create(model=golden.model, stream=True, temperature=0, **greedy(golden))
        return [id async for chunk in stream for choice in chunk.choices for id in choice.token_ids]

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{golden.url}/v1", api_key=KEY, max_retries=0) as sdk:
            return await asyncio.gather(*(one(sdk) for _ in range(5)))

    assert asyncio.run(run()) == [golden.golden.greedy] * 5


def test_prompt_logprobs(golden):
    answer = complete(golden, **greedy(golden, max_tokens=1, extra_body={"prompt_logprobs": 0}))
    entries = answer.choices[0].prompt_logprobs
    own = [entry[str(id)]["logprob"] for entry, id in zip(entries[1:], golden.golden.ids[1:], strict=True)]
    spread = max(abs(value) for row in golden.golden.logits for value in row)
    assert own == pytest.approx(list(golden.golden.scores()), abs=4e-4 * spread)


def test_a_prompt_in_halves(golden):
    """The continuation of half a prompt, fed back, is scored as the whole prompt's."""
    half = len(golden.golden.ids) // 2
    logprobs = [
        collect(complete(golden, **greedy(golden, prompt=golden.golden.ids[:end], logprobs=0, stream=True))).logprobs[0]
        for end in (half, len(golden.golden.ids), half)
    ]
    assert logprobs[0] == logprobs[2] and len(logprobs[1]) == len(golden.golden.greedy)
