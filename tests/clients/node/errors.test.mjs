import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { ENDLESS, busy, chat, client, complete, demo, eventually, inFlight, key, outcomes, script } from "./helpers.mjs";

const wrong = [
  [{ model: "other" }, OpenAI.NotFoundError, "model"],
  [{ messages: [] }, OpenAI.BadRequestError, "messages"],
  [{ temperature: 3 }, OpenAI.BadRequestError, "temperature"],
  [{ n: 17 }, OpenAI.BadRequestError, "n"],
  [{ top_logprobs: 2 }, OpenAI.BadRequestError, "top_logprobs"],
  [{ stop: ["a", "b", "c", "d", "e"] }, OpenAI.BadRequestError, "stop"],
  [{ tools: [{ type: "function" }] }, OpenAI.BadRequestError, "tools[0].function"],
  [{ nonsense: 1 }, OpenAI.BadRequestError, "nonsense"],
  [{ stream: true, temperature: -1 }, OpenAI.BadRequestError, "temperature"],
];
for (const [fields, kind, param] of wrong) {
  test(`refused: ${JSON.stringify(fields)}`, async () => {
    await assert.rejects(chat(demo, fields), (error) => {
      assert.ok(error instanceof kind, error);
      assert.equal(error.param, param);
      assert.equal(error.error.code, error.status);
      return true;
    });
  });
}

for (const [fields, param] of [
  [{ best_of: 2 }, "best_of"],
  [{ suffix: "x" }, "suffix"],
  [{ prompt: [] }, "prompt"],
  [{ prompt: [1e9] }, "prompt[0]"],
  [{ max_tokens: 0 }, "max_tokens"],
]) {
  test(`a completion is refused: ${param}`, async () => {
    await assert.rejects(complete(demo, fields), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, param);
      return true;
    });
  });
}

test("a prompt beyond the context", async () => {
  await assert.rejects(complete(script, { prompt: "x".repeat(3000) }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "input_tokens");
    return true;
  });
});

test("a wrong key", async () => {
  await assert.rejects(client(demo, { apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
});

test("a route that is none", async () => {
  await assert.rejects(client(demo).embeddings.create({ model: "demo", input: "x" }), OpenAI.NotFoundError);
});

test("leaving a stream cancels it", async () => {
  const before = await outcomes(demo, "client_gone");
  const stream = await complete(demo, { ...ENDLESS, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    break;
  }
  await eventually(async () => (await outcomes(demo, "client_gone")) === before + 1);
  await eventually(async () => (await inFlight(demo)) === 0);
});

test("aborting by a signal", async () => {
  const before = await outcomes(demo, "client_gone");
  const controller = new AbortController();
  const running = chat(demo, ENDLESS, { signal: controller.signal });
  await eventually(async () => (await inFlight(demo)) === 1);
  controller.abort();
  await assert.rejects(running, OpenAI.APIUserAbortError);
  await eventually(async () => (await outcomes(demo, "client_gone")) === before + 1);
});

test("the client's timeout", async () => {
  const before = await outcomes(demo, "client_gone");
  await assert.rejects(chat(demo, ENDLESS, { timeout: 300 }), OpenAI.APIConnectionTimeoutError);
  await eventually(async () => (await outcomes(demo, "client_gone")) === before + 1);
});

const occupy = async (count) => {
  const streams = [];
  for (let at = 0; at < count; at++) {
    streams.push(await complete(busy, { ...ENDLESS, stream: true }));
    await eventually(async () => (await inFlight(busy)) === at + 1);
  }
  return () => streams.forEach((stream) => stream.controller.abort());
};

test("a quota is a rate limit", async () => {
  const release = await occupy(2);
  await assert.rejects(complete(busy), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    return true;
  });
  release();
  await eventually(async () => (await inFlight(busy)) === 0);
  assert.equal((await complete(busy)).usage.completion_tokens, 8);
});

test("the SDK comes back when told to", async () => {
  const release = await occupy(2);
  const before = await outcomes(busy, "shed_429");
  const patient = client(busy, { maxRetries: 5, apiKey: key });
  const running = patient.completions.create({ model: "demo", prompt: "The", max_tokens: 2 });
  await eventually(async () => (await outcomes(busy, "shed_429")) > before);
  release();
  assert.equal((await running).usage.completion_tokens, 2);
});

test("a crowd of streams", async () => {
  const one = async (seed) => (await complete(demo, { seed, temperature: 1, max_tokens: 12 })).choices[0].text;
  const alone = [];
  for (let seed = 0; seed < 12; seed++) alone.push(await one(seed));
  assert.deepEqual(await Promise.all(alone.map((_, seed) => one(seed))), alone);
});
