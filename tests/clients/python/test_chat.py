"""`client.chat.completions`."""

import json

import pytest
from calls import NEEDLE, QUESTION, chat, collect, say, tokenize
from harness import scripted


def test_answers_what_the_text_says(demo):
    answer = chat(demo, messages=NEEDLE, max_tokens=40)
    (choice,) = answer.choices
    assert choice.message.content == "The secret code of Lisbon is 48213."
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "demo"


def test_usage_is_what_tokenize_counts(demo):
    usage = chat(demo, messages=NEEDLE, max_tokens=3).usage
    counted = tokenize(demo, messages=NEEDLE)
    assert usage.prompt_tokens == counted["count"] == len(counted["tokens"])
    assert (usage.completion_tokens, usage.total_tokens) == (3, counted["count"] + 3)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [{"role": "user", "content": [{"type": "text", "text": "What is the"}, {"type": "text", "text": "code?"}]}],
        [*QUESTION, {"role": "assistant", "content": "48213"}, {"role": "user", "content": "Again?"}],
        [{"role": "user", "content": "Ünïcödé 🌊 안녕 \u0000 </s>"}],
        [{"role": "user", "content": ""}],
    ],
    ids=["system", "parts", "turns", "unicode", "empty"],
)
def test_messages(demo, messages):
    counted = tokenize(demo, messages=messages)["count"]
    assert chat(demo, messages=messages).usage.prompt_tokens == counted


def test_parts_are_joined_by_a_newline(demo):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = tokenize(demo, messages=[{"role": "user", "content": "a\nb"}])
    assert tokenize(demo, messages=[{"role": "user", "content": parts}]) == joined


def test_both_names_of_the_limit(demo):
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 7}):
        answer = chat(demo, messages=NEEDLE, **{"max_tokens": None, **limit})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_without_a_limit_it_ends_by_itself(script):
    answer = say(script, "talk", max_tokens=None)
    assert answer.choices[0].message.content == scripted.TEXTS["talk"]
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (scripted.LENGTHS["talk"], "stop")


def test_a_limit_beyond_the_context_is_clamped(script):
    answer = say(script, "count", max_tokens=10**9, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == scripted.CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_stop_over_the_borders_of_tokens(script):
    # "roll ashore" comes as "waves ro", "ll ash", "ore; the riv".
    answer = say(script, "talk", stop=["never", "oll ashor"])
    assert answer.choices[0].message.content == "Naïve 🌊 waves r"
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", "oll ashor")
    kept = say(script, "talk", stop="oll ashor", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "Naïve 🌊 waves roll ashor"


def test_a_stop_that_almost_comes_changes_nothing(script):
    answer = say(script, "talk", stop=["oll ashorf", "🌊 waver"])
    assert answer.choices[0].message.content == scripted.TEXTS["talk"]
    assert answer.choices[0].stop_reason is None


def test_characters_over_the_borders_of_tokens_are_streamed_whole(script):
    streamed = collect(say(script, "talk", stream=True))
    pieces = [choice.delta.content or "" for chunk in streamed.chunks for choice in chunk.choices]
    assert "".join(pieces) == scripted.TEXTS["talk"]
    assert "🌊" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_stop_token_ids(script):
    (id,) = tokenize(script, prompt="5, ")["tokens"]
    answer = say(script, "count", extra_body={"stop_token_ids": [id]})
    assert answer.choices[0].message.content == "1, 2, 3, 4, "
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", id)


def test_choices_have_their_own_seeds(demo):
    hot = {"messages": NEEDLE, "max_tokens": 12, "temperature": 2, "seed": 11}
    texts = [choice.message.content for choice in chat(demo, n=4, **hot).choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in chat(demo, n=4, **hot).choices]
    alone = [chat(demo, **{**hot, "seed": 11 + at}).choices[0].message.content for at in range(4)]
    assert texts == alone


def test_continue_the_final_message(demo):
    begun = [*NEEDLE, {"role": "assistant", "content": "The secret code of Lis"}]
    answer = chat(demo, messages=begun, max_tokens=40, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == "bon is 48213."


def test_variables_reach_the_template(script):
    for name in ("answer", "count"):
        assert say(script, name).choices[0].message.content == scripted.TEXTS[name]


def test_render_shows_the_prompt_that_chats_have(script):
    body = {"messages": QUESTION, "chat_template_kwargs": {"script": "count"}}
    rendered = script.sdk.post("/chat/completions/render", body=body, cast_to=object)
    assert rendered["prompt"].endswith("<|im_start|>assistant\n<|count|>")
    assert rendered["count"] == say(script, "count").usage.prompt_tokens
    answer = script.sdk.completions.create(model=script.model, prompt=rendered["token_ids"], max_tokens=64)
    assert answer.choices[0].text == scripted.TEXTS["count"]


def test_token_ids_are_returned(script):
    answer = say(script, "count", extra_body={"return_token_ids": True})
    ids = answer.choices[0].token_ids
    assert len(ids) == scripted.LENGTHS["count"] == answer.usage.completion_tokens
    assert ids[:-1] == tokenize(script, prompt=scripted.TEXTS["count"])["tokens"]
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_special_tokens_are_skipped_unless_wanted(script):
    # What follows the end of a script is byte 0, in a model without other ideas.
    for skip, text in ((True, "10."), (False, "10.<|im_end|>")):
        options = {"ignore_eos": True, "skip_special_tokens": skip}
        answer = say(script, "count", max_tokens=scripted.LENGTHS["count"], extra_body=options)
        assert answer.choices[0].message.content.endswith(text)


def test_unset_fields_are_null_and_there(demo):
    raw = demo.sdk.chat.completions.with_raw_response.create(model="demo", messages=QUESTION, max_tokens=1)
    body = json.loads(raw.text)
    for name in ("system_fingerprint", "prompt_logprobs", "kv_transfer_params"):
        assert body[name] is None
    assert body["choices"][0]["logprobs"] is None
