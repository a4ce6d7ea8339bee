"""A stream adds up to the answer without one."""

import json

import pytest
from calls import NEEDLE, chat, collect, complete, say
from harness import scripted

OPTIONS = {
    "greedy": {},
    "seeded": {"seed": 3, "temperature": 1},
    "choices": {"n": 3, "seed": 5, "temperature": 1.5},
    "stop": {"stop": ["code"]},
    "one-token": {"max_tokens": 1},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1},
}


def scores(items):
    return [(item.token, item.logprob) for item in items or []]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chat(demo, options):
    fields = {"messages": NEEDLE, "max_tokens": 16, **options}
    whole = chat(demo, **fields)
    streamed = collect(chat(demo, **fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        assert streamed.texts[choice.index] == choice.message.content
        assert streamed.reasons[choice.index] == choice.finish_reason
        assert scores(streamed.logprobs.get(choice.index)) == scores(choice.logprobs and choice.logprobs.content)
    assert len(streamed.texts) == len(whole.choices)
    assert streamed.usage == whole.usage.model_copy(update={"prompt_tokens_details": None})
    assert {chunk.id for chunk in streamed.chunks} == {streamed.chunks[0].id}


COMPLETIONS = {
    "greedy": {},
    "choices": {"n": 2, "seed": 5, "temperature": 1.5},
    "prompts": {"prompt": ["The river", "The road", "A"]},
    "echo": {"echo": True},
    "logprobs": {"logprobs": 2},
    "ids": {"prompt": [5, 6, 7]},
}


@pytest.mark.parametrize("options", COMPLETIONS.values(), ids=COMPLETIONS)
def test_completions(demo, options):
    whole = complete(demo, **options)
    streamed = collect(complete(demo, **options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        assert streamed.texts[choice.index] == choice.text
        assert streamed.reasons[choice.index] == choice.finish_reason
        assert streamed.logprobs.get(choice.index) == (choice.logprobs and choice.logprobs.token_logprobs)
    assert streamed.usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("name", scripted.SCRIPTS)
def test_every_script(script, name):
    whole = say(script, name).choices[0].message.content
    assert collect(say(script, name, stream=True)).texts == {0: whole}
    assert whole == scripted.TEXTS[name]


def test_the_sdk_s_own_accumulator(demo):
    with demo.sdk.chat.completions.stream(model="demo", messages=NEEDLE, max_tokens=40, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat(demo, messages=NEEDLE, max_tokens=40).choices[0].message.content
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_the_order_of_chunks(demo):
    chunks = collect(chat(demo, n=2, stream=True, stream_options={"include_usage": True})).chunks
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_continuous_usage_counts_up(script):
    options = {"include_usage": True, "continuous_usage_stats": True}
    usages = [chunk.usage for chunk in say(script, "count", stream=True, stream_options=options)]
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert counts == sorted(counts) and counts[-1] == scripted.LENGTHS["count"]
    assert len(counts) > scripted.LENGTHS["count"]


def test_no_usage_unless_asked_for(demo):
    assert collect(chat(demo, stream=True)).usage is None


def test_bytes_on_the_wire(demo):
    with demo.sdk.chat.completions.with_streaming_response.create(
        model="demo", messages=NEEDLE, max_tokens=2, temperature=0, stream=True
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = b"".join(response.iter_bytes()).decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"
    assert "\n\n\n" not in text and "\r" not in text
