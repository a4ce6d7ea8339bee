import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { NEEDLE, chat, client, collect, complete, demo } from "./helpers.mjs";

const schema = {
  type: "object",
  properties: { city: { enum: ["Lisbon", "Oslo"] }, code: { type: "string", pattern: "^[0-9]{5}$" } },
  required: ["city", "code"],
  additionalProperties: false,
};
const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
const tool = { type: "function", function: { name: "tell_code", parameters: schema } };
const check = (text) => {
  const value = JSON.parse(text);
  assert.deepEqual(Object.keys(value).sort(), ["city", "code"]);
  assert.ok(["Lisbon", "Oslo"].includes(value.city));
  assert.match(value.code, /^[0-9]{5}$/);
};

for (const seed of [1, 2, 3]) {
  test(`json_schema, whole and streamed, seed ${seed}`, async () => {
    const fields = { messages: NEEDLE, max_tokens: 200, temperature: 1.5, seed, response_format };
    const whole = await chat(demo, fields);
    check(whole.choices[0].message.content);
    assert.equal(whole.choices[0].finish_reason, "stop");
    assert.deepEqual((await collect(chat(demo, { ...fields, stream: true }))).texts, [whole.choices[0].message.content]);
  });

  test(`a required tool, whole and streamed, seed ${seed}`, async () => {
    const fields = { tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 400, temperature: 1.5, seed };
    const { choices } = await chat(demo, fields);
    assert.equal(choices[0].finish_reason, "tool_calls");
    const [{ function: call }] = choices[0].message.tool_calls;
    assert.equal(call.name, "tell_code");
    check(call.arguments);
    assert.deepEqual((await collect(chat(demo, { ...fields, stream: true }))).calls, [{ ...call }]);
  });
}

test("the SDK runs a named tool", async () => {
  const asked = [];
  const runner = client(demo).chat.completions.runTools({
    model: "demo",
    messages: NEEDLE,
    max_tokens: 400,
    temperature: 1,
    seed: 4,
    tool_choice: { type: "function", function: { name: "tell_code" } },
    tools: [{ type: "function", function: { ...tool.function, parse: JSON.parse, function: (args) => void asked.push(args) } }],
  });
  await runner.done();
  assert.equal(asked.length, 1);
  check(JSON.stringify(asked[0]));
});

for (const [body, pattern] of [
  [{ structured_outputs: { regex: "[0-9]{3}-[a-f]{2}" } }, /^[0-9]{3}-[a-f]{2}$/],
  [{ structured_outputs: { choice: ["the river", "neither"] } }, /^(the river|neither)$/],
  [{ guided_regex: "(ab){2,4}" }, /^(ab){2,4}$/],
]) {
  test(`constraints beyond the SDK's types: ${JSON.stringify(body)}`, async () => {
    const fields = { ...body, max_tokens: 64, temperature: 2, seed: 1 };
    assert.match((await complete(demo, fields)).choices[0].text, pattern);
    assert.match((await chat(demo, fields)).choices[0].message.content, pattern);
  });
}

test("what cannot be obeyed is refused", async () => {
  for (const fields of [
    { response_format: { type: "xml" } },
    { structured_outputs: { regex: "(" } },
    { tools: [tool], tool_choice: { type: "function", function: { name: "other" } } },
  ]) {
    await assert.rejects(chat(demo, fields), OpenAI.BadRequestError);
  }
});
