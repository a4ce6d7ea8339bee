// Servers that the driver has started, and streams put together.
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";

export const { key, otherKey, demo, script, busy, texts, lengths, context } = JSON.parse(process.env.LONGHAUL_SERVERS);

export const client = (url, options = {}) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 120_000, ...options });

export const QUESTION = [{ role: "user", content: "What is the secret code of Lisbon?" }];
export const NEEDLE = [
  {
    role: "user",
    content:
      "The river was calm. The secret code of Lisbon is 48213. The road went on.\n\nWhat is the secret code of Lisbon?",
  },
];
export const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
export const ENDLESS = { max_tokens: 100_000, ignore_eos: true };

const sdks = new Map();
const sdkOf = (url) => {
  if (!sdks.has(url)) sdks.set(url, client(url));
  return sdks.get(url);
};
const modelOf = (url) => (url === script ? "scripted" : "demo");

export const chat = (url, fields = {}, options = {}) =>
  sdkOf(url).chat.completions.create(
    { model: modelOf(url), messages: QUESTION, max_tokens: 8, temperature: 0, ...fields },
    options,
  );
export const complete = (url, fields = {}, options = {}) =>
  sdkOf(url).completions.create(
    { model: modelOf(url), prompt: "The river", max_tokens: 8, temperature: 0, ...fields },
    options,
  );
export const say = (name, fields = {}) =>
  chat(script, { max_tokens: 64, chat_template_kwargs: { script: name }, ...fields });
export const tokenize = async (url, body) => {
  const answer = await fetch(`${url}/tokenize`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.equal(answer.status, 200);
  return answer.json();
};

// What the chunks of a stream add up to, by choice.
export const collect = async (stream) => {
  const out = { texts: [], reasons: [], calls: [], usage: null, chunks: [] };
  for await (const chunk of await stream) {
    out.chunks.push(chunk);
    out.usage = chunk.usage ?? out.usage;
    for (const { index, delta, text, finish_reason } of chunk.choices) {
      out.texts[index] = (out.texts[index] ?? "") + ((delta ? delta.content : text) ?? "");
      for (const call of delta?.tool_calls ?? []) {
        out.calls[call.index] ??= { name: "", arguments: "" };
        out.calls[call.index].name += call.function.name ?? "";
        out.calls[call.index].arguments += call.function.arguments ?? "";
      }
      if (finish_reason) {
        assert.equal(out.reasons[index], undefined, "a choice ends once");
        out.reasons[index] = finish_reason;
      }
    }
  }
  return out;
};

export const metric = async (url, name, label = "") => {
  const page = await (await fetch(`${url}/metrics`)).text();
  for (const line of page.split("\n")) {
    const at = line.lastIndexOf(" ");
    if (line.split(/[{ ]/, 1)[0] === name && line.includes(label)) return Number(line.slice(at + 1));
  }
  throw new Error(`${name} ${label} is not in /metrics`);
};
export const outcomes = (url, outcome) => metric(url, "longhaul_requests_finished_total", `outcome="${outcome}"`);
export const inFlight = async (url) =>
  (await metric(url, "vllm:num_requests_running")) + (await metric(url, "vllm:num_requests_waiting"));

export const eventually = async (condition) => {
  for (let tries = 0; tries < 1500; tries++) {
    if (await condition()) return;
    await sleep(20);
  }
  assert.fail("it never came true");
};
