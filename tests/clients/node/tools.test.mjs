import assert from "node:assert/strict";
import { test } from "node:test";
import { QUESTION, WEATHER, chat, client, collect, say, script, texts } from "./helpers.mjs";

test("a call", async () => {
  const { choices } = await chat(script, { tools: [WEATHER], max_tokens: 64 });
  assert.equal(choices[0].finish_reason, "tool_calls");
  assert.equal(choices[0].message.content, null);
  const [call] = choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Lisbon", unit: "c" });
});

for (const name of ["call", "two", "broken", "talk"]) {
  test(`streamed calls are the whole ones: ${name}`, async () => {
    const { choices } = await say(name, { tools: [WEATHER] });
    const streamed = await collect(say(name, { tools: [WEATHER], stream: true }));
    assert.deepEqual(streamed.texts, [choices[0].message.content ?? ""]);
    assert.deepEqual(streamed.reasons, [choices[0].finish_reason]);
    const calls = (choices[0].message.tool_calls ?? []).map((call) => ({ ...call.function }));
    assert.deepEqual(streamed.calls, calls);
  });
}

test("the SDK runs the tool and tells the model", async () => {
  const asked = [];
  const runner = client(script).chat.completions.runTools({
    model: "scripted",
    messages: QUESTION,
    max_tokens: 64,
    tools: [
      {
        type: "function",
        function: {
          ...WEATHER.function,
          parse: JSON.parse,
          function: (args) => {
            asked.push(args);
            return '{"degrees": 21}';
          },
        },
      },
    ],
  });
  assert.equal(await runner.finalContent(), texts.answer);
  assert.deepEqual(asked, [{ city: "Lisbon", unit: "c" }]);
  assert.deepEqual(runner.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant"]);
});

test("the SDK runs a streamed tool", async () => {
  const runner = client(script).chat.completions.runTools({
    model: "scripted",
    messages: QUESTION,
    max_tokens: 64,
    stream: true,
    tools: [{ type: "function", function: { ...WEATHER.function, parse: JSON.parse, function: ({ city }) => `sunny in ${city}` } }],
  });
  assert.equal(await runner.finalContent(), texts.answer);
  assert.equal(await runner.finalFunctionToolCallResult(), "sunny in Lisbon");
});

test("tool_choice none", async () => {
  const { choices } = await chat(script, { tools: [WEATHER], tool_choice: "none", max_tokens: 64 });
  assert.equal(choices[0].message.content, texts.talk);
});

test("parallel_tool_calls false keeps the first", async () => {
  const { choices } = await say("two", { tools: [WEATHER], parallel_tool_calls: false });
  assert.deepEqual(choices[0].message.tool_calls.map((call) => call.function.name), ["get_weather"]);
});
