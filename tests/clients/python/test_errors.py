"""What is wrong is refused by the SDK's own classes of errors, with a message that names the field."""

import json

import openai
import pytest
from calls import NEEDLE, QUESTION, WEATHER, chat, complete, say
from conftest import client, start
from harness import scripted
from harness.servers import GOLDENS

CHAT = [
    ({"model": "other"}, openai.NotFoundError, "model"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        openai.BadRequestError,
        "type",
    ),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"top_p": 0}, openai.BadRequestError, "top_p"),
    ({"n": 17}, openai.BadRequestError, "n"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 1000}, openai.BadRequestError, "top_logprobs"),
    ({"stop": ["a", "b", "c", "d", "e"]}, openai.BadRequestError, "stop"),
    ({"stop": ""}, openai.BadRequestError, "stop"),
    ({"logit_bias": {"-1": 1}}, openai.BadRequestError, "logit_bias"),
    ({"logit_bias": {"1": 101}}, openai.BadRequestError, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ({"tools": [{"type": "function"}]}, openai.BadRequestError, "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, openai.BadRequestError, "name"),
    ({"modalities": ["audio"]}, openai.BadRequestError, "modalities"),
    ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ({"extra_body": {"chat_template": "{{ 1 }}"}}, openai.BadRequestError, "chat_template"),
    ({"extra_body": {"min_tokens": 9}}, openai.BadRequestError, "min_tokens"),
    ({"extra_body": {"stop_token_ids": [10**9]}}, openai.BadRequestError, "stop_token_ids"),
    ({"extra_body": {"allowed_token_ids": []}}, openai.BadRequestError, "allowed_token_ids"),
    ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError, "use_beam_search"),
]


def refused(kind, param, create, **fields):
    with pytest.raises(kind) as caught:
        create(**fields)
    body = caught.value.body
    assert body["message"] and body["code"] == caught.value.status_code
    assert param in (body["param"] or ""), body
    assert param in body["message"] or kind is openai.NotFoundError, body
    return body


@pytest.mark.parametrize(("fields", "kind", "param"), CHAT, ids=[f"{param}-{at}" for at, (_, _, param) in enumerate(CHAT)])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat(demo, fields, kind, param, stream):
    if stream and "stream_options" in fields:
        fields = {"stream_options": {"include_usage": "yes"}}
    refused(kind, param, lambda **more: chat(demo, **more), **fields, stream=stream)


COMPLETIONS = [
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [10**9]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 1000}, "logprobs"),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETIONS, ids=[f"{param}-{at}" for at, (_, param) in enumerate(COMPLETIONS)])
def test_completions(demo, fields, param):
    refused(openai.BadRequestError, param, lambda **more: complete(demo, **more), **fields)


@pytest.mark.parametrize("create", [complete, chat])
def test_a_prompt_beyond_the_context(script, create):
    text = "x" * 3000
    fields = {"prompt": text} if create is complete else {"messages": [{"role": "user", "content": text}]}
    with pytest.raises(openai.BadRequestError) as caught:
        create(script, **fields)
    body = caught.value.body
    assert body["param"] == "input_tokens"
    assert body["message"].startswith(f"This model's maximum context length is {scripted.CONTEXT} tokens. However, ")


def test_a_prompt_that_fills_the_context_leaves_no_room(script):
    fits = complete(script, prompt="x" * (scripted.CONTEXT - 1), max_tokens=5)
    assert fits.usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError):
        complete(script, prompt="x" * scripted.CONTEXT)


@pytest.mark.parametrize("key", ["wrong", "", "clients-test-keyx"])
def test_keys(demo, key):
    sdk = client(demo, key=key or "x", default_headers={} if key else {"Authorization": "Basic eDp5"})
    for call in (sdk.models.list, lambda: chat(demo, sdk=sdk), lambda: complete(demo, sdk=sdk)):
        with pytest.raises(openai.AuthenticationError) as caught:
            call()
        assert caught.value.status_code == 401
        assert json.loads(caught.value.response.text) == {"error": "Unauthorized"}


def test_a_route_that_is_none(demo):
    with pytest.raises(openai.NotFoundError):
        demo.sdk.embeddings.create(model="demo", input="x")
    with pytest.raises(openai.NotFoundError):
        demo.sdk.models.retrieve("demo/nothing")


def test_a_method_that_is_none(demo):
    with pytest.raises(openai.APIStatusError) as caught:
        demo.sdk.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405 and "POST" in caught.value.response.headers["allow"]


def post(server, content, **headers):
    headers = {"Authorization": f"Bearer {server.sdk.api_key}", "Content-Type": "application/json", **headers}
    return server.sdk._client.post(f"{server.url}/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"prompt": "a"} x', b"\xff\xfe", b'{"a": NaN}', b"[" * 100000])
def test_bodies_that_are_no_json_object(demo, content):
    answer = post(demo, content)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "BadRequestError"


def test_types_of_bodies(demo):
    good = b'{"prompt": "a", "max_tokens": 1}'
    assert post(demo, good, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200
    assert post(demo, good, **{"Content-Type": "text/plain"}).status_code == 400
    assert post(demo, good, **{"Content-Encoding": "gzip"}).status_code == 415
    assert post(demo, b" " * (40 << 20)).status_code == 413


def test_an_error_leaves_the_connection_usable(demo):
    sdk = client(demo)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError):
            chat(demo, sdk=sdk, temperature=9)
        assert chat(demo, sdk=sdk, max_tokens=1).choices


def test_no_chat_without_a_tokenizer():
    server = start(model=GOLDENS / "dense-tied")
    server.sdk = client(server)
    try:
        for create in (lambda: chat(server), lambda: complete(server), lambda: complete(server, prompt=[5], stop="x")):
            with pytest.raises(openai.BadRequestError) as caught:
                create()
            assert "tokenizer" in caught.value.message or "template" in caught.value.message
        assert complete(server, prompt=[5, 6]).usage.completion_tokens == 8
    finally:
        assert server.stop() == 0


def test_refusals_are_booked(demo):
    before = demo.outcomes("invalid_4xx")
    with pytest.raises(openai.BadRequestError):
        chat(demo, n=17)
    assert demo.outcomes("invalid_4xx") == before + 1


def test_no_call_without_the_named_tool(script):
    (choice,) = say(script, "call", tools=[WEATHER | {"function": {"name": "other"}}], messages=QUESTION).choices
    # The parser reports what the model said; whether such a tool exists is the client's to decide, as with the rivals.
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_long_answers_are_cut_at_the_request_s_deadline(scripted_model):
    server = start("--request-timeout", "0.5", "--shutdown-timeout", "0")
    server.sdk = client(server)
    endless = {"messages": NEEDLE, "max_tokens": 100000, "extra_body": {"ignore_eos": True}}
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            chat(server, **endless)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError) as caught:
            for _ in chat(server, stream=True, **endless):
                pass
        assert caught.value.body["code"] == 504
        assert server.outcomes("deadline") == 2
    finally:
        server.stop()
