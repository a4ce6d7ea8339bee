"""Tools: what the model says becomes calls, whole or streamed."""

import json

import pytest
from calls import QUESTION, TIME, WEATHER, chat, collect, say
from harness import scripted


def test_a_call(script):
    answer = chat(script, tools=[WEATHER], max_tokens=64)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Lisbon", "unit": "c"}
    assert call.id.startswith("chatcmpl-tool-")


def test_two_calls_behind_text(script):
    (choice,) = say(script, "two", tools=[WEATHER, TIME]).choices
    assert choice.message.content == "I look."
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "get_time"]
    assert json.loads(choice.message.tool_calls[1].function.arguments) == {}
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_parallel_tool_calls_false_keeps_the_first(script):
    (choice,) = say(script, "two", tools=[WEATHER, TIME], parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]


@pytest.mark.parametrize("name", ["call", "two", "broken", "talk"])
def test_streamed_calls_are_the_whole_ones(script, name):
    (whole,) = say(script, name, tools=[WEATHER, TIME]).choices
    streamed = collect(say(script, name, tools=[WEATHER, TIME], stream=True))
    assert streamed.texts[0] == (whole.message.content or "")
    assert streamed.reasons == {0: whole.finish_reason}
    calls = [(call["name"], call["arguments"]) for call in streamed.calls.get(0, {}).values()]
    assert calls == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]


def test_the_sdk_puts_a_streamed_call_together(script):
    with script.sdk.chat.completions.stream(
        model=script.model, messages=QUESTION, tools=[WEATHER], max_tokens=64, temperature=0
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [event.name for event in done] == ["get_weather"]
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments)["city"] == "Lisbon"


def test_what_is_no_call_stays_text(script):
    (choice,) = say(script, "broken", tools=[WEATHER]).choices
    assert choice.message.content == scripted.TEXTS["broken"]
    assert (choice.finish_reason, choice.message.tool_calls or []) == ("stop", [])


def test_without_tools_nothing_is_parsed(script):
    (choice,) = say(script, "call").choices
    assert choice.message.content == scripted.TEXTS["call"] and choice.finish_reason == "stop"


def test_tool_choice_none(script):
    (choice,) = chat(script, tools=[WEATHER], tool_choice="none", max_tokens=64).choices
    # The template is not told of tools, either.
    assert choice.message.content == scripted.TEXTS["talk"] and not choice.message.tool_calls


def test_the_round_trip(script):
    first = chat(script, tools=[WEATHER], max_tokens=64).choices[0].message
    messages = [
        *QUESTION,
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"sky": "clear", "degrees": 21}'},
    ]
    (choice,) = chat(script, messages=messages, tools=[WEATHER], max_tokens=64).choices
    assert choice.message.content == scripted.TEXTS["answer"] and choice.finish_reason == "stop"


def test_the_template_sees_tools_calls_and_results(script):
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    body = {"messages": messages, "tools": [WEATHER]}
    prompt = script.sdk.post("/chat/completions/render", body=body, cast_to=object)["prompt"]
    for part in ('"name": "get_weather"', '"arguments": {"zone": "UTC"}', "<|im_start|>tool\nnoon<|im_end|>", "<|answer|>"):
        assert part in prompt


def test_the_outcome_is_booked(script):
    before = script.outcomes("tool_calls")
    chat(script, tools=[WEATHER], max_tokens=64)
    assert script.outcomes("tool_calls") == before + 1


def test_a_call_cut_by_the_limit_is_text(script):
    (choice,) = chat(script, tools=[WEATHER], max_tokens=4).choices
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    assert scripted.TEXTS["call"].startswith(choice.message.content)
