"""What SDKs, proxies and probes find around the answers."""

import json
import urllib.request

import openai
import pytest
from calls import QUESTION, chat, complete
from conftest import client, start


def get(server, path, **headers):
    request = urllib.request.Request(f"{server.url}{path}", headers=headers)
    with urllib.request.urlopen(request) as response:
        return response.status, response.headers, response.read().decode()


def test_models(demo):
    (model,) = demo.sdk.models.list().data
    assert (model.id, model.object, model.root, model.parent) == ("demo", "model", "demo", None)
    assert model.max_model_len > 768


def test_names_of_the_model():
    server = start("--served-model-name", "first", "second", name="first")
    server.sdk = client(server)
    try:
        assert [model.id for model in server.sdk.models.list().data] == ["first", "second"]
        assert [complete(server, model=name).model for name in ("first", "second")] == ["first", "second"]
        with pytest.raises(openai.NotFoundError):
            complete(server, model="demo")
    finally:
        assert server.stop() == 0


def test_request_ids(demo):
    answer = demo.sdk.chat.completions.with_raw_response.create(
        model="demo", messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine" == answer.request_id
    assert json.loads(answer.text)["id"] == "chatcmpl-mine"


def test_an_id_that_is_none_is_replaced(demo):
    answer = demo.sdk.completions.with_raw_response.create(
        model="demo", prompt="A", max_tokens=1, extra_headers={"X-Request-Id": "a b\tc"}
    )
    assert answer.headers["x-request-id"] not in ("", "a b\tc")


def test_every_answer_has_its_own_id(demo):
    assert len({chat(demo, max_tokens=1).id for _ in range(5)}) == 5


@pytest.mark.parametrize("path", ["/health", "/ping", "/live"])
def test_probes(demo, path):
    status, _, body = get(demo, path)
    assert (status, body) == (200, "")


def test_ready_version_load(demo):
    assert json.loads(get(demo, "/ready")[2]) == {"status": "ready"}
    assert json.loads(get(demo, "/version")[2])["version"]
    assert json.loads(get(demo, "/load")[2]) == {"server_load": 0}


def test_metrics_count_tokens(demo):
    before = demo.metric("vllm:prompt_tokens_total"), demo.metric("vllm:generation_tokens_total")
    usage = complete(demo, max_tokens=5).usage
    after = demo.metric("vllm:prompt_tokens_total"), demo.metric("vllm:generation_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (usage.prompt_tokens, usage.completion_tokens)


def test_metrics_are_prometheus(demo):
    _, headers, page = get(demo, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    assert len(samples) > 100
    for line in samples:
        float(line.rpartition(" ")[2])


def test_requests_reconcile(demo):
    chat(demo, max_tokens=1)
    finished = 0.0
    for line in get(demo, "/metrics")[2].splitlines():
        if line.startswith("longhaul_requests_finished_total"):
            finished += float(line.rpartition(" ")[2])
    assert finished == demo.metric("longhaul_requests_received_total")


def test_openapi_knows_every_route_that_answers(demo):
    document = json.loads(get(demo, "/openapi.json")[2])
    assert document["openapi"].startswith("3.")
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/metrics"):
        assert path in document["paths"]


def test_cached_tokens_are_told_if_wanted():
    server = start("--enable-prompt-tokens-details")
    server.sdk = client(server)
    try:
        prompt = "The river was calm and the road went on. " * 10
        first, again = (complete(server, prompt=prompt).usage for _ in range(2))
        assert first.prompt_tokens_details.cached_tokens == 0
        assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens
        # A salt of one's own shares nothing.
        salted = complete(server, prompt=prompt, extra_body={"cache_salt": "x"}).usage
        assert salted.prompt_tokens_details.cached_tokens == 0
    finally:
        assert server.stop() == 0


def test_usage_without_being_asked():
    server = start("--enable-force-include-usage")
    server.sdk = client(server)
    try:
        chunks = list(chat(server, stream=True))
        assert chunks[-1].usage.completion_tokens and chunks[-1].choices == []
    finally:
        assert server.stop() == 0


def test_without_keys_on_this_machine():
    server = start(keys=False)
    server.sdk = client(server, key="anything")
    try:
        assert complete(server).choices
        with pytest.raises(openai.BadRequestError):
            # What a web page of someone else's would send.
            complete(server, extra_headers={"Host": "evil.example"})
    finally:
        assert server.stop() == 0
