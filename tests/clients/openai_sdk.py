"""The OpenAI Python SDK against `longhaul serve` with the demo model. See README.md."""

import json
import re
import subprocess
import sys
import unittest

import openai

KEY = "sdk-test-key"
QUESTION = [{"role": "user", "content": "What is the secret code of Lisbon?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class Server:
    """A server on a free port, ready."""

    def __init__(self, binary):
        command = [binary, "serve", "--port", "0", "--device", "cpu", "--dtype", "float32", "--enable-request-id-headers"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"LONGHAUL_API_KEY": KEY})
        for line in self.process.stderr:
            if found := re.match(r"listening on (http://[^,]+),", line):
                self.url = found.group(1)
            if line.startswith("ready: "):
                return
        raise SystemExit(f"the server ended with {self.process.wait()}")

    def client(self, key=KEY):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def stop(self):
        self.process.terminate()
        return self.process.wait()


class Sdk(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(BINARY)
        cls.client = cls.server.client()
        cls.chat = staticmethod(
            lambda **more: cls.client.chat.completions.create(
                **{"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0, **more}
            )
        )
        cls.complete = staticmethod(
            lambda **more: cls.client.completions.create(
                **{"model": "demo", "prompt": "The river", "max_tokens": 8, "temperature": 0, **more}
            )
        )

    @classmethod
    def tearDownClass(cls):
        code = cls.server.stop()
        assert code == 0, f"the server ended with {code}"

    def test_models(self):
        (model,) = self.client.models.list().data
        self.assertEqual((model.id, model.object), ("demo", "model"))

    def test_chat(self):
        answer = self.chat()
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertTrue(answer.choices[0].message.content)
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertTrue(answer.id.startswith("chatcmpl-"))

    def test_streams_add_up_to_whole_answers(self):
        for options in ({}, {"seed": 3, "temperature": 1}, {"stop": ["code"]}, {"n": 3, "seed": 5, "temperature": 1}):
            with self.subTest(options):
                whole = self.chat(**options)
                texts = [""] * len(whole.choices)
                reasons = [None] * len(whole.choices)
                usage = None
                for chunk in self.chat(**options, stream=True, stream_options={"include_usage": True}):
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        texts[choice.index] += choice.delta.content or ""
                        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
                self.assertEqual(texts, [choice.message.content for choice in whole.choices])
                self.assertEqual(reasons, [choice.finish_reason for choice in whole.choices])
                self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)

    def test_the_sdk_s_own_accumulator(self):
        with self.client.chat.completions.stream(
            model="demo", messages=QUESTION, max_tokens=8, temperature=0
        ) as stream:
            for _ in stream:
                pass
            final = stream.current_completion_snapshot
        self.assertEqual(final.choices[0].message.content, self.chat().choices[0].message.content)

    def test_sampling_fields(self):
        for field, values in {
            "temperature": (0, 0.7, 2),
            "top_p": (0.1, 1),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "seed": (0, 1, -5),
            "n": (1, 4),
            "stop": ("x", ["x", "y"]),
            "logit_bias": ({"5": 10}, {}),
            "user": ("somebody",),
            "max_completion_tokens": (1, 5),
        }.items():
            for value in values:
                with self.subTest(field, value=value):
                    answer = self.chat(**{field: value})
                    self.assertEqual(len(answer.choices), value if field == "n" else 1)

    def test_extra_fields(self):
        for body in (
            {"top_k": 5},
            {"min_p": 0.1},
            {"repetition_penalty": 1.2},
            {"min_tokens": 4},
            {"ignore_eos": True},
            {"stop_token_ids": [7]},
            {"allowed_token_ids": [5, 6]},
            {"truncate_prompt_tokens": 5},
            {"priority": 1},
            {"cache_salt": "s"},
            {"return_token_ids": True},
            {"skip_special_tokens": False},
            {"include_stop_str_in_output": True},
        ):
            with self.subTest(body):
                self.chat(extra_body=body)
                self.complete(extra_body=body)

    def test_seeds(self):
        first, again, other = (self.complete(seed=seed, temperature=1, max_tokens=20).choices[0].text for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_min_tokens_and_ignore_eos(self):
        answer = self.chat(max_tokens=40, extra_body={"ignore_eos": True})
        self.assertEqual((answer.usage.completion_tokens, answer.choices[0].finish_reason), (40, "length"))
        answer = self.chat(max_tokens=40, extra_body={"min_tokens": 30})
        self.assertGreaterEqual(answer.usage.completion_tokens, 30)

    def test_chat_logprobs(self):
        answer = self.chat(logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        self.assertEqual(len(content), answer.usage.completion_tokens)
        for token in content:
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertAlmostEqual(token.logprob, token.top_logprobs[0].logprob, places=3)

    def test_completion(self):
        answer = self.complete()
        self.assertEqual(answer.object, "text_completion")
        self.assertTrue(answer.choices[0].text)

    def test_echo_scores_the_prompt(self):
        answer = self.complete(echo=True, logprobs=2, max_tokens=1)
        logprobs = answer.choices[0].logprobs
        self.assertTrue(answer.choices[0].text.startswith("The river"))
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertEqual(len(logprobs.tokens), answer.usage.total_tokens)
        self.assertEqual("".join(logprobs.tokens), answer.choices[0].text)

    def test_lists_of_prompts(self):
        for prompt, count in ((["The river", "The road"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)):
            with self.subTest(prompt):
                self.assertEqual(len(self.complete(prompt=prompt).choices), count)

    def test_messages(self):
        for messages in (
            [{"role": "system", "content": "Be brief."}, *QUESTION],
            [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            [*QUESTION, {"role": "assistant", "content": "48213"}, {"role": "user", "content": "Again?"}],
        ):
            with self.subTest(messages):
                self.chat(messages=messages)

    def test_tools_are_taken(self):
        for choice in ("auto", "none"):
            answer = self.chat(tools=[TOOL], tool_choice=choice)
            self.assertFalse(answer.choices[0].message.tool_calls)

    def test_errors(self):
        for create, more, kind in (
            (self.chat, {"model": "other"}, openai.NotFoundError),
            (self.chat, {"messages": []}, openai.BadRequestError),
            (self.chat, {"temperature": 3}, openai.BadRequestError),
            (self.chat, {"n": 17}, openai.BadRequestError),
            (self.chat, {"top_logprobs": 2}, openai.BadRequestError),
            (self.chat, {"tools": [TOOL], "tool_choice": "required"}, openai.BadRequestError),
            (self.chat, {"response_format": {"type": "json_object"}}, openai.BadRequestError),
            (self.chat, {"extra_body": {"nonsense": 1}}, openai.BadRequestError),
            (self.complete, {"best_of": 2}, openai.BadRequestError),
            (self.complete, {"suffix": "x"}, openai.BadRequestError),
            (self.complete, {"prompt": ""}, openai.BadRequestError),
            (self.complete, {"prompt": [10**9]}, openai.BadRequestError),
            (self.complete, {"max_tokens": 0}, openai.BadRequestError),
        ):
            with self.subTest(more):
                with self.assertRaises(kind) as caught:
                    create(**more)
                self.assertTrue(caught.exception.body["message"])

    def test_keys(self):
        with self.assertRaises(openai.AuthenticationError):
            self.server.client("wrong").models.list()

    def test_leaving_a_stream_cancels(self):
        endless = self.complete(max_tokens=60000, stream=True, extra_body={"ignore_eos": True})
        next(iter(endless))
        endless.close()
        # One request runs at a time: this one answers only when the other has ended.
        self.assertTrue(self.complete(max_tokens=1).choices)

    def test_request_ids(self):
        answer = self.client.chat.completions.with_raw_response.create(
            model="demo", messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
        )
        self.assertEqual(answer.headers["x-request-id"], "mine")
        self.assertEqual(json.loads(answer.text)["id"], "chatcmpl-mine")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: openai_sdk.py BINARY")
    BINARY = sys.argv.pop()
    unittest.main()
