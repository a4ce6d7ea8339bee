import assert from "node:assert/strict";
import { test } from "node:test";
import { NEEDLE, chat, client, collect, context, demo, lengths, say, script, texts, tokenize } from "./helpers.mjs";

test("a chat answers what the text says", async () => {
  const answer = await chat(demo, { messages: NEEDLE, max_tokens: 40 });
  assert.equal(answer.choices[0].message.content, "The secret code of Lisbon is 48213.");
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.object, "chat.completion");
  assert.match(answer.id, /^chatcmpl-/);
});

test("usage is what /tokenize counts", async () => {
  const { usage } = await chat(demo, { messages: NEEDLE, max_tokens: 3 });
  const { count } = await tokenize(demo, { messages: NEEDLE });
  assert.deepEqual([usage.prompt_tokens, usage.completion_tokens, usage.total_tokens], [count, 3, count + 3]);
});

const options = {
  greedy: {},
  seeded: { seed: 3, temperature: 1 },
  choices: { n: 3, seed: 5, temperature: 1.5 },
  stop: { stop: ["code"] },
  "one token": { max_tokens: 1 },
  penalties: { presence_penalty: 1, frequency_penalty: 1 },
  "token limit of both names": { max_completion_tokens: 3 },
};
for (const [name, fields] of Object.entries(options)) {
  test(`a stream adds up: ${name}`, async () => {
    const request = { messages: NEEDLE, max_tokens: 16, ...fields };
    const whole = await chat(demo, request);
    const streamed = await collect(chat(demo, { ...request, stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(streamed.texts, whole.choices.map((choice) => choice.message.content));
    assert.deepEqual(streamed.reasons, whole.choices.map((choice) => choice.finish_reason));
    assert.equal(streamed.usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(streamed.usage.prompt_tokens, whole.usage.prompt_tokens);
  });
}

for (const name of Object.keys(texts)) {
  test(`the script ${name}, whole and streamed`, async () => {
    assert.equal((await say(name)).choices[0].message.content, texts[name]);
    assert.deepEqual((await collect(say(name, { stream: true }))).texts, [texts[name]]);
  });
}

test("the SDK's own accumulator", async () => {
  const runner = client(demo).chat.completions.stream({ model: "demo", messages: NEEDLE, max_tokens: 40, temperature: 0 });
  let deltas = "";
  runner.on("content", (delta) => (deltas += delta));
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, "The secret code of Lisbon is 48213.");
  assert.equal(deltas, final.choices[0].message.content);
});

test("characters that tokens tear are streamed whole", async () => {
  const { chunks } = await collect(say("talk", { stream: true }));
  const pieces = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? ""));
  assert.ok(pieces.includes("🌊"));
  assert.ok(!pieces.some((piece) => piece.includes("\ufffd")));
});

test("a stop string over the borders of tokens", async () => {
  const { choices } = await say("talk", { stop: ["never", "oll ashor"] });
  assert.deepEqual([choices[0].message.content, choices[0].stop_reason], ["Naïve 🌊 waves r", "oll ashor"]);
});

test("a limit beyond the context is clamped", async () => {
  const answer = await say("count", { max_tokens: 1e9, ignore_eos: true });
  assert.equal(answer.usage.total_tokens, context);
  assert.equal(answer.choices[0].finish_reason, "length");
});

test("seeds repeat", async () => {
  const draw = async (seed) => (await chat(demo, { messages: NEEDLE, seed, temperature: 2, max_tokens: 20 })).choices[0].message.content;
  const first = await draw(1);
  assert.equal(await draw(1), first);
  assert.notEqual(await draw(2), first);
});

test("logprobs spell the answer", async () => {
  const answer = await chat(demo, { messages: NEEDLE, max_tokens: 40, logprobs: true, top_logprobs: 2 });
  const { content } = answer.choices[0].logprobs;
  assert.equal(content.length, answer.usage.completion_tokens);
  const spelt = Buffer.from(content.flatMap((token) => token.bytes)).toString();
  assert.ok(spelt.startsWith(answer.choices[0].message.content));
  for (const { logprob, token, top_logprobs } of content) {
    assert.equal(top_logprobs.length, 2);
    assert.equal(top_logprobs[0].token, token);
    assert.ok(logprob <= 0 && top_logprobs[0].logprob === logprob);
  }
});

test("min_tokens and ignore_eos, beyond the SDK's types", async () => {
  assert.equal((await say("count", { max_tokens: 40, ignore_eos: true })).usage.completion_tokens, 40);
  assert.ok((await say("count", { max_tokens: 40, min_tokens: 30 })).usage.completion_tokens >= 30);
});

test("token ids are returned", async () => {
  const { choices } = await say("count", { return_token_ids: true });
  assert.equal(choices[0].token_ids.length, lengths.count);
  assert.deepEqual(choices[0].token_ids.slice(0, -1), (await tokenize(script, { prompt: texts.count })).tokens);
});

test("request ids and raw headers", async () => {
  const { data, response, request_id } = await chat(demo, { max_tokens: 1 }, { headers: { "X-Request-Id": "mine" } }).withResponse();
  assert.equal(data.id, "chatcmpl-mine");
  assert.equal(response.headers.get("x-request-id"), "mine");
  assert.equal(request_id, "mine");
});

test("events as bytes", async () => {
  const response = await chat(demo, { stream: true, max_tokens: 2 }).asResponse();
  assert.equal(response.headers.get("content-type"), "text/event-stream; charset=utf-8");
  const events = (await response.text()).split("\n\n");
  assert.deepEqual(events.slice(-2), ["data: [DONE]", ""]);
  for (const event of events.slice(0, -2)) assert.equal(JSON.parse(event.slice(6)).object, "chat.completion.chunk");
});

test("the models", async () => {
  const models = [];
  for await (const model of client(demo).models.list()) models.push(model.id);
  assert.deepEqual(models, ["demo"]);
});

test("parts of a message", async () => {
  const parts = [{ type: "text", text: "What is the" }, { type: "text", text: "code?" }];
  const joined = await tokenize(demo, { messages: [{ role: "user", content: "What is the\ncode?" }] });
  const { usage } = await chat(demo, { messages: [{ role: "user", content: parts }] });
  assert.equal(usage.prompt_tokens, joined.count);
});
