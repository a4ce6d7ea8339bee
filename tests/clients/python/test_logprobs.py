"""Log probabilities."""

import math

import pytest
from calls import NEEDLE, chat, complete, say, tokenize
from harness import scripted


def test_chat_tokens_spell_the_answer(demo):
    answer = chat(demo, messages=NEEDLE, max_tokens=40, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    spelt = bytes(byte for token in content for byte in token.bytes).decode()
    assert spelt.startswith(answer.choices[0].message.content)
    for token in content:
        assert len(token.top_logprobs) == 3
        # Greedy: the drawn token is the best one.
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
        assert [top.logprob for top in token.top_logprobs] == sorted((top.logprob for top in token.top_logprobs), reverse=True)


def test_chat_without_alternatives(demo):
    content = chat(demo, logprobs=True).choices[0].logprobs.content
    assert content and all(token.top_logprobs == [] for token in content)


def test_probabilities_sum_to_at_most_one(demo):
    content = chat(demo, logprobs=True, top_logprobs=20, temperature=1, seed=1).choices[0].logprobs.content
    for token in content:
        total = sum(math.exp(top.logprob) for top in token.top_logprobs)
        assert 0 < total <= 1 + 1e-4


def test_bytes_of_broken_characters(script):
    content = say(script, "talk", logprobs=True).choices[0].logprobs.content
    spelt = bytes(byte for token in content[:-1] for byte in token.bytes)
    assert spelt.decode() == scripted.TEXTS["talk"]
    assert [token.bytes for token in content[1:5]] == [[0xF0], [0x9F], [0x8C], [0x8A]]
    # One successor, or nearly so.
    assert all(token.logprob > -1e-3 for token in content)


def test_echo_scores_the_prompt(demo):
    answer = complete(demo, echo=True, logprobs=2, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert answer.choices[0].text.startswith("The river")
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert len(logprobs.tokens) == answer.usage.total_tokens
    starts = [0]
    for token in logprobs.tokens[:-1]:
        starts.append(starts[-1] + len(token))
    assert logprobs.text_offset == starts


def test_echo_agrees_with_generation(demo):
    made = complete(demo, logprobs=0, max_tokens=12)
    ids = tokenize(demo, prompt="The river")["tokens"]
    drawn = complete(demo, max_tokens=12, extra_body={"return_token_ids": True}).choices[0].token_ids
    scored = complete(demo, prompt=ids + drawn, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs.token_logprobs
    assert scored[len(ids) :] == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=2e-4)


def test_scoring_only(demo):
    answer = complete(demo, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "The river" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens


def test_prompt_logprobs_are_the_echo(demo):
    scored = complete(demo, echo=True, logprobs=3, max_tokens=1, extra_body={"prompt_logprobs": 3})
    ids = tokenize(demo, prompt="The river")["tokens"]
    entries = scored.choices[0].prompt_logprobs
    assert entries[0] is None and len(entries) == len(ids)
    for at in range(1, len(ids)):
        own = entries[at][str(ids[at])]
        assert own["logprob"] == pytest.approx(scored.choices[0].logprobs.token_logprobs[at], abs=1e-6)


def test_prompt_logprobs_of_chats(demo):
    answer = chat(demo, messages=NEEDLE, extra_body={"prompt_logprobs": 1})
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


def test_a_cached_prompt_has_the_same_scores(demo):
    prompt = "The river was calm and the road went on, " * 8
    hits = demo.metric("vllm:prefix_cache_hits_total")
    first = complete(demo, prompt=prompt, echo=True, logprobs=1, max_tokens=2).choices[0].logprobs
    again = complete(demo, prompt=prompt, echo=True, logprobs=1, max_tokens=2).choices[0].logprobs
    assert first == again
    # Scores of a prompt's tokens are computed, not cached; what follows it without them is.
    assert complete(demo, prompt=prompt, logprobs=1, max_tokens=2).choices[0].logprobs.token_logprobs == first.token_logprobs[-2:]
    assert demo.metric("vllm:prefix_cache_hits_total") > hits


def test_tokens_as_ids(demo):
    answer = complete(demo, logprobs=1, extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True})
    choice = answer.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{id}" for id in choice.token_ids]


def test_logprobs_are_those_before_sampling_rules(demo):
    plain = complete(demo, logprobs=1, max_tokens=1).choices[0].logprobs
    (best,) = plain.top_logprobs[0]
    ruled = complete(demo, logprobs=1, max_tokens=1, temperature=0.3, top_p=0.5, seed=1).choices[0].logprobs
    assert ruled.top_logprobs[0][best] == plain.token_logprobs[0]


def test_greedy_tokens_are_recognised_as_evaluators_do(demo):
    logprobs = complete(demo, logprobs=1, max_tokens=30, extra_body={"ignore_eos": True}).choices[0].logprobs
    for drawn, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert drawn == max(top.values())
