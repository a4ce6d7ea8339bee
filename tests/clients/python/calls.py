"""Requests as the tests make them, and streams put together."""

import time
from dataclasses import dataclass, field

QUESTION = [{"role": "user", "content": "What is the secret code of Lisbon?"}]
NEEDLE_TEXT = "The river was calm. The secret code of Lisbon is 48213. The road went on."
NEEDLE = [{"role": "user", "content": f"{NEEDLE_TEXT}\n\n{QUESTION[0]['content']}"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def chat(server, sdk=None, **more):
    fields = {"model": server.model, "messages": QUESTION, "max_tokens": 8, "temperature": 0, **more}
    return (sdk or server.sdk).chat.completions.create(**fields)


def complete(server, sdk=None, **more):
    fields = {"model": server.model, "prompt": "The river", "max_tokens": 8, "temperature": 0, **more}
    return (sdk or server.sdk).completions.create(**fields)


def say(server, script, **more):
    """A script of the scripted model."""
    body = {"chat_template_kwargs": {"script": script}, **more.pop("extra_body", {})}
    return chat(server, max_tokens=more.pop("max_tokens", 64), extra_body=body, **more)


def tokenize(server, **body):
    return server.sdk.post(f"{server.url}/tokenize", body=body, cast_to=object)


@dataclass
class Streamed:
    """What the chunks of a stream add up to, by choice."""

    texts: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)
    logprobs: dict = field(default_factory=dict)
    usage: object = None
    chunks: list = field(default_factory=list)

    def add(self, chunk):
        self.chunks.append(chunk)
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            at = choice.index
            delta = getattr(choice, "delta", None)
            text = choice.text if delta is None else delta.content
            self.texts[at] = self.texts.get(at, "") + (text or "")
            for call in (delta.tool_calls if delta is not None else None) or []:
                known = self.calls.setdefault(at, {}).setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
            if choice.logprobs is not None:
                scores = choice.logprobs.content if delta is not None else choice.logprobs.token_logprobs
                self.logprobs.setdefault(at, []).extend(scores or [])
            if choice.finish_reason is not None:
                assert at not in self.reasons, "a choice ends once"
                self.reasons[at] = choice.finish_reason


def collect(stream):
    out = Streamed()
    for chunk in stream:
        out.add(chunk)
    return out


def eventually(condition, seconds=30):
    """Waits until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
