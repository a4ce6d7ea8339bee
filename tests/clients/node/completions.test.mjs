import assert from "node:assert/strict";
import { test } from "node:test";
import { collect, complete, demo, script, texts, tokenize } from "./helpers.mjs";

test("a completion", async () => {
  const answer = await complete(demo);
  assert.equal(answer.object, "text_completion");
  assert.equal(answer.usage.prompt_tokens, (await tokenize(demo, { prompt: "The river" })).count);
  assert.equal(answer.usage.completion_tokens, 8);
});

const options = {
  greedy: {},
  choices: { n: 2, seed: 5, temperature: 1.5 },
  prompts: { prompt: ["The river", "The road", "A"] },
  echo: { echo: true },
  ids: { prompt: [5, 6, 7] },
  "lists of ids": { prompt: [[5, 6], [7]] },
};
for (const [name, fields] of Object.entries(options)) {
  test(`a stream of completions adds up: ${name}`, async () => {
    const whole = await complete(demo, fields);
    const streamed = await collect(complete(demo, { ...fields, stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(streamed.texts, whole.choices.map((choice) => choice.text));
    assert.deepEqual(streamed.reasons, whole.choices.map((choice) => choice.finish_reason));
    assert.equal(streamed.usage.total_tokens, whole.usage.total_tokens);
  });
}

test("echo scores the prompt", async () => {
  const answer = await complete(demo, { echo: true, logprobs: 2, max_tokens: 0 });
  const { tokens, token_logprobs } = answer.choices[0].logprobs;
  assert.equal(tokens.join(""), "The river");
  assert.equal(token_logprobs[0], null);
  assert.ok(token_logprobs.slice(1).every((logprob) => logprob < 0));
  assert.equal(answer.usage.completion_tokens, 0);
});

test("sixteen tokens unless said otherwise", async () => {
  assert.equal((await complete(demo, { max_tokens: null, ignore_eos: true })).usage.completion_tokens, 16);
});

test("special tokens of prompts are special", async () => {
  assert.equal((await complete(script, { prompt: "<|count|>", max_tokens: 64 })).choices[0].text, texts.count);
});

test("logit bias", async () => {
  const answer = await complete(demo, { logit_bias: { 5: 100 }, return_token_ids: true, ignore_eos: true });
  assert.deepEqual(answer.choices[0].token_ids, Array(8).fill(5));
});
