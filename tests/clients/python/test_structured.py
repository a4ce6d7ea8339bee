"""Answers of a given form: `response_format`, vLLM's `structured_outputs`, and tools that must be called."""

import asyncio
import json
import re
from enum import Enum

import openai
import pytest
from calls import NEEDLE, TIME, WEATHER, chat, collect, complete
from harness.servers import KEY
from pydantic import BaseModel, Field


class City(Enum):
    lisbon = "Lisbon"
    oslo = "Oslo"


class Code(BaseModel):
    city: City
    code: str = Field(pattern="^[0-9]{5}$")
    sure: bool


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Lisbon", "Oslo"]},
        "code": {"type": "string", "pattern": "^[0-9]{5}$"},
        "marks": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "minItems": 2, "maxItems": 3},
    },
    "required": ["city", "code", "marks"],
    "additionalProperties": False,
}


def of_schema(schema, name="answer"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def check(text):
    value = json.loads(text)
    assert set(value) == {"city", "code", "marks"} and value["city"] in ("Lisbon", "Oslo")
    assert re.fullmatch("[0-9]{5}", value["code"])
    assert 2 <= len(value["marks"]) <= 3 and all(1 <= mark <= 9 and isinstance(mark, int) for mark in value["marks"])


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1, "seed": 4}, {"temperature": 2, "seed": 5}], ids=["greedy", "warm", "hot"]
)
def test_json_schema(demo, sampling):
    answer = chat(demo, messages=NEEDLE, max_tokens=200, response_format=of_schema(SCHEMA), **sampling)
    assert answer.choices[0].finish_reason == "stop"
    check(answer.choices[0].message.content)


def test_json_schema_of_every_choice(demo):
    answer = chat(demo, n=4, temperature=1.5, seed=1, max_tokens=200, response_format=of_schema(SCHEMA))
    texts = [choice.message.content for choice in answer.choices]
    assert len(texts) == 4 and len(set(texts)) > 1
    for text in texts:
        check(text)


def test_json_schema_streamed(demo):
    fields = {"messages": NEEDLE, "max_tokens": 200, "response_format": of_schema(SCHEMA), "temperature": 1, "seed": 2}
    whole = chat(demo, **fields)
    streamed = collect(chat(demo, **fields, stream=True))
    assert streamed.texts == {0: whole.choices[0].message.content} and streamed.reasons == {0: "stop"}


def test_the_sdk_parses_into_a_model(demo):
    answer = demo.sdk.chat.completions.parse(
        model="demo", messages=NEEDLE, max_tokens=200, temperature=1, seed=3, response_format=Code
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Code) and re.fullmatch("[0-9]{5}", parsed.code)


def test_the_sdk_parses_a_stream_into_a_model(demo):
    with demo.sdk.chat.completions.stream(
        model="demo", messages=NEEDLE, max_tokens=200, temperature=1, seed=3, response_format=Code
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Code)


def test_an_answer_that_is_cut_is_cut(demo):
    answer = chat(demo, max_tokens=3, response_format=of_schema(SCHEMA))
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    with pytest.raises(openai.LengthFinishReasonError):
        demo.sdk.chat.completions.parse(model="demo", messages=NEEDLE, max_tokens=3, response_format=Code)


def test_json_object(demo):
    answer = chat(demo, max_tokens=300, temperature=1, seed=7, response_format={"type": "json_object"})
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_format_text_changes_nothing(demo):
    plain = chat(demo, messages=NEEDLE, max_tokens=40)
    assert chat(demo, messages=NEEDLE, max_tokens=40, response_format={"type": "text"}).choices == plain.choices


CONSTRAINTS = [
    ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, "[0-9]{3}-[a-f]{2}"),
    ({"structured_outputs": {"choice": ["the river", "the road", "neither"]}}, "the river|the road|neither"),
    ({"structured_outputs": {"json": SCHEMA}}, r"(?s)\{.*\}"),
    ({"structured_outputs": {"grammar": 'start: ("yes" | "no") "!"'}}, "(yes|no)!"),
    ({"guided_regex": "(ab){2,4}"}, "(ab){2,4}"),
    ({"guided_choice": ["a", "ab", "abc"]}, "a|ab|abc"),
    ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
]


@pytest.mark.parametrize(("body", "pattern"), CONSTRAINTS, ids=[json.dumps(body)[:40] for body, _ in CONSTRAINTS])
@pytest.mark.parametrize("route", [chat, complete])
def test_constraints(demo, route, body, pattern):
    for sampling in ({}, {"temperature": 2, "seed": 1}, {"temperature": 2, "seed": 2}):
        (choice,) = route(demo, max_tokens=200, extra_body=body, **sampling).choices
        text = choice.message.content if route is chat else choice.text
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, text), text


def test_constraints_go_together_with_rules(demo):
    body = {"structured_outputs": {"regex": "[0-9]{4}"}, "return_token_ids": True}
    answer = chat(demo, n=2, temperature=1, seed=1, logprobs=True, top_logprobs=2, presence_penalty=1, extra_body=body)
    for choice in answer.choices:
        assert re.fullmatch("[0-9]{4}", choice.message.content)
        assert len(choice.logprobs.content) == len(choice.token_ids)


def arguments_of(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert set(arguments) <= {"city", "unit"} and isinstance(arguments["city"], str)
        assert arguments.get("unit", "c") in ("c", "f")
    return arguments


CITY = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lisbon", "Oslo"]}, "unit": {"enum": ["c", "f"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_tool_that_is_required(demo, temperature):
    fields = {"temperature": temperature, "seed": 3, "max_tokens": 400}
    (choice,) = chat(demo, tools=[CITY, TIME], tool_choice="required", parallel_tool_calls=False, **fields).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")
    arguments_of(call)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_tool_that_is_named(demo, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = chat(demo, tools=[TIME, CITY], tool_choice=named, temperature=1.5, seed=seed, max_tokens=400).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and arguments_of(call)["city"] in ("Lisbon", "Oslo")


def test_a_required_tool_streamed(demo):
    fields = {"tools": [CITY], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 6}
    (whole,) = chat(demo, max_tokens=400, **fields).choices
    streamed = collect(chat(demo, max_tokens=400, **fields, stream=True))
    calls = [(call["name"], call["arguments"]) for call in streamed.calls[0].values()]
    assert calls == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert streamed.reasons == {0: whole.finish_reason}


def test_the_sdk_parses_a_required_tool(demo):
    tool = openai.pydantic_function_tool(Code, name="tell_code")
    answer = demo.sdk.chat.completions.parse(
        model="demo", messages=NEEDLE, tools=[tool], tool_choice="required", max_tokens=400, parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Code)


def test_a_model_that_would_not_call_must(script):
    """Its own words are a talk; under the constraint it calls."""
    body = {"chat_template_kwargs": {"script": "talk"}}
    (choice,) = chat(
        script, tools=[CITY], tool_choice="required", parallel_tool_calls=False, max_tokens=400, extra_body=body
    ).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and arguments_of(call)


WRONG = [
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": of_schema({"type": "nonsense"})}, "schema"),
    ({"response_format": of_schema({"$ref": "http://localhost/x.json"})}, "schema"),
    ({"extra_body": {"structured_outputs": {"regex": "("}}}, "regex"),
    ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
    ({"extra_body": {"structured_outputs": {"choice": []}}}, "choice"),
    ({"extra_body": {"structured_outputs": {"grammar": "start: missing"}}}, "grammar"),
    ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[json.dumps(fields)[:60] for fields, _ in WRONG])
def test_what_cannot_be_obeyed_is_refused(demo, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(demo, **fields)
    assert param in caught.value.body["param"], caught.value.body


def test_grammars_do_not_mix(demo):
    """Many forms at once, each obeyed."""
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key=KEY, max_retries=0) as sdk:
            ask = lambda n: sdk.completions.create(  # noqa: E731
                model="demo",
                prompt="The",
                max_tokens=64,
                temperature=1,
                seed=n,
                extra_body={"structured_outputs": {"regex": f"{chr(97 + n)}{{{n + 1}}}"}} if n % 3 else {},
            )
            return await asyncio.gather(*(ask(n) for n in range(16)))

    for n, answer in enumerate(asyncio.run(run())):
        if n % 3:
            assert answer.choices[0].text == chr(97 + n) * (n + 1)
