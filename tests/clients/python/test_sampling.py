"""Fields that decide which token is drawn."""

import pytest
from calls import chat, complete, say, tokenize
from harness import scripted


def ids(server, **more):
    body = {"return_token_ids": True, "ignore_eos": True, **more.pop("extra_body", {})}
    return complete(server, extra_body=body, **more).choices[0].token_ids


FIELDS = [
    ("temperature", 0.0),
    ("temperature", 2),
    ("top_p", 1e-6),
    ("top_p", 1),
    ("presence_penalty", -2),
    ("frequency_penalty", 2),
    ("seed", -(2**63)),
    ("seed", 2**63 - 1),
    ("logit_bias", {}),
    ("user", "somebody"),
    ("metadata", {"a": "b"}),
    ("store", False),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{field}={value}" for field, value in FIELDS])
def test_bounds_of_fields(demo, field, value):
    assert chat(demo, max_tokens=2, **{field: value}).usage.completion_tokens <= 2


EXTRA = [
    ("top_k", -1),
    ("top_k", 1),
    ("min_p", 1.0),
    ("repetition_penalty", 1.2),
    ("truncate_prompt_tokens", 5),
    ("priority", -3),
    ("cache_salt", "s"),
    ("request_id", "mine"),
]


@pytest.mark.parametrize(("field", "value"), EXTRA, ids=[f"{field}={value}" for field, value in EXTRA])
def test_fields_of_the_dialect(demo, field, value):
    assert chat(demo, max_tokens=2, extra_body={field: value}).choices
    assert complete(demo, max_tokens=2, extra_body={field: value}).choices


def test_seeds_repeat(demo):
    hot = {"temperature": 1.5, "max_tokens": 20}
    first, again, other = (ids(demo, seed=seed, **hot) for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_seed_draws_differ(demo):
    assert len({tuple(ids(demo, temperature=2, max_tokens=24)) for _ in range(4)}) > 1


def test_rules_that_leave_one_token_are_greedy(demo):
    greedy = ids(demo)
    for rule in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert ids(demo, temperature=1.5, seed=9, **rule) == greedy


def test_logit_bias(demo):
    (first, *_) = ids(demo)
    assert ids(demo, logit_bias={"5": 100}) == [5] * 8
    assert ids(demo, logit_bias={str(first): -100})[0] != first


def test_allowed_token_ids(demo):
    drawn = ids(demo, temperature=2, seed=4, max_tokens=30, extra_body={"allowed_token_ids": [7, 9, 11]})
    assert set(drawn) <= {7, 9, 11} and len(set(drawn)) > 1


def test_repetition_is_penalised(demo):
    plain = ids(demo, max_tokens=60)
    punished = ids(demo, max_tokens=60, frequency_penalty=2, presence_penalty=2)
    assert len(set(punished)) > len(set(plain))


def test_min_tokens_and_ignore_eos(script):
    assert say(script, "count", max_tokens=40, extra_body={"ignore_eos": True}).usage.completion_tokens == 40
    answer = say(script, "count", max_tokens=40, extra_body={"min_tokens": 30})
    assert answer.usage.completion_tokens >= 30
    assert answer.choices[0].message.content.startswith(scripted.TEXTS["count"])


def test_truncation_keeps_the_end(script):
    words = tokenize(script, prompt="abcdefgh<|count|>")["tokens"]
    answer = complete(script, prompt="abcdefgh<|count|>", max_tokens=64, extra_body={"truncate_prompt_tokens": 3})
    assert answer.usage.prompt_tokens == 3 < len(words)
    assert answer.choices[0].text == scripted.TEXTS["count"]


def test_a_temperature_changes_no_certainty(script):
    assert say(script, "count", temperature=2, seed=1).choices[0].message.content == scripted.TEXTS["count"]


def test_the_prompt_cache_changes_no_token(demo):
    fields = {"prompt": "The river was calm and the road went on. " * 12, "max_tokens": 30, "seed": 8, "temperature": 1}
    hits = demo.metric("vllm:prefix_cache_hits_total")
    texts = [complete(demo, **fields, extra_body={"cache_salt": salt}).choices[0].text for salt in ("a", "a", "b")]
    assert len(set(texts)) == 1
    assert demo.metric("vllm:prefix_cache_hits_total") > hits
