"""`client.completions`."""

import pytest
from calls import complete, tokenize
from harness import scripted


def test_completion(demo):
    answer = complete(demo)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage.prompt_tokens == tokenize(demo, prompt="The river")["count"]
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8


def test_sixteen_tokens_unless_said_otherwise(demo):
    answer = complete(demo, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("The river", 1), (["The river", "The road"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
    ids=["text", "texts", "ids", "lists-of-ids"],
)
def test_kinds_of_prompts(demo, prompt, count):
    answer = complete(demo, prompt=prompt)
    assert [choice.index for choice in answer.choices] == list(range(count))


def test_ids_are_the_text(demo):
    assert complete(demo).choices[0].text == complete(demo, prompt=tokenize(demo, prompt="The river")["tokens"]).choices[0].text


def test_a_list_is_as_each_alone(demo):
    prompts = ["The river", "The road", "What is", "A"]
    together = complete(demo, prompt=prompts, n=2, seed=6, temperature=1)
    texts = [choice.text for choice in together.choices]
    alone = [choice.text for prompt in prompts for choice in complete(demo, prompt=prompt, n=2, seed=6, temperature=1).choices]
    assert texts == alone
    assert together.usage.prompt_tokens == sum(tokenize(demo, prompt=prompt)["count"] for prompt in prompts)


def test_echo(script):
    answer = complete(script, prompt="<|talk|>", echo=True, max_tokens=64, stop=["river"])
    assert answer.choices[0].text == "<|talk|>Naïve 🌊 waves roll ashore; the "


def test_special_tokens_of_prompts_are_special(script):
    assert tokenize(script, prompt="<|count|>")["count"] == 1
    assert complete(script, prompt="<|count|>", max_tokens=64).choices[0].text == scripted.TEXTS["count"]


def test_detokenize_is_the_way_back(demo):
    text = "Ünïcödé 🌊 \n\n The river"
    tokens = tokenize(demo, prompt=text, return_token_strs=True)
    assert len(tokens["token_strs"]) == tokens["count"]
    back = demo.sdk.post(f"{demo.url}/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
    assert back == {"prompt": text}
