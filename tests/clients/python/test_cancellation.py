"""Clients that leave, wait, hurry and come in crowds."""

import asyncio

import openai
import pytest
from calls import NEEDLE, QUESTION, chat, collect, complete, eventually, say
from conftest import client, start
from harness import scripted
from harness.servers import KEY, OTHER_KEY

ENDLESS = {"max_tokens": 100000, "extra_body": {"ignore_eos": True}}


def idle(server):
    return load(server) == 0


@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_closing_a_stream(demo, chunks):
    before = demo.outcomes("client_gone")
    stream = chat(demo, stream=True, **ENDLESS)
    for _ in range(chunks):
        next(stream)
    stream.close()
    eventually(lambda: demo.outcomes("client_gone") == before + 1)
    eventually(lambda: idle(demo))
    assert demo.metric("vllm:kv_cache_usage_perc") < 0.5


def test_leaving_the_block_of_a_stream(demo):
    before = demo.outcomes("client_gone")
    with complete(demo, stream=True, n=3, **ENDLESS) as stream:
        next(stream)
    eventually(lambda: demo.outcomes("client_gone") == before + 1)


def test_a_client_s_timeout(demo):
    before = demo.outcomes("client_gone")
    with pytest.raises(openai.APITimeoutError):
        chat(demo, timeout=0.3, **ENDLESS)
    eventually(lambda: demo.outcomes("client_gone") == before + 1)
    eventually(lambda: idle(demo))


def test_cancelling_a_task(demo):
    before = demo.outcomes("client_gone")

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key=KEY, max_retries=0) as sdk:
            task = asyncio.create_task(sdk.completions.create(model="demo", prompt="The", **ENDLESS))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    eventually(lambda: demo.outcomes("client_gone") == before + 1)


def test_a_crowd_gets_what_each_gets_alone(demo):
    requests = [
        {"prompt": prompt, "max_tokens": 4 + at, "temperature": temperature, "seed": at}
        for at, (prompt, temperature) in enumerate(
            [(p, t) for p in ("The river", "The road", [5, 6, 7], "What is") for t in (0, 0.7, 1, 2)]
        )
    ]
    alone = [complete(demo, **request).choices[0].text for request in requests]

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key=KEY, max_retries=0) as sdk:
            answers = await asyncio.gather(*(sdk.completions.create(model="demo", **request) for request in requests))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(run()) == alone


def test_async_streams_interleave(script):
    async def one(sdk, name):
        stream = await sdk.chat.completions.create(
            model=script.model, messages=QUESTION, stream=True, extra_body={"chat_template_kwargs": {"script": name}}
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{script.url}/v1", api_key=KEY) as sdk:
            return await asyncio.gather(*(one(sdk, name) for name in ("talk", "count", "answer") * 4))

    assert asyncio.run(run()) == [scripted.TEXTS[name] for name in ("talk", "count", "answer") * 4]


def test_a_quota_is_a_rate_limit(busy):
    streams = occupy(busy, 2)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(busy)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.body["type"] == "RateLimitError"
    release(streams)
    eventually(lambda: idle(busy))
    assert complete(busy).choices
    assert busy.outcomes("shed_429") == 1


def test_a_full_queue_is_unavailable(busy):
    streams = occupy(busy, 2) + occupy(busy, 1, key=OTHER_KEY)
    with pytest.raises(openai.InternalServerError) as caught:
        complete(busy, sdk=client(busy, key=OTHER_KEY))
    # The key's own quota is as used up as the queue: either is said, with when to come back.
    assert caught.value.status_code in (429, 503)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    release(streams)


def test_the_sdk_comes_back_when_told_to(busy):
    streams = occupy(busy, 2)
    refused = busy.outcomes("shed_429")

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{busy.url}/v1", api_key=KEY, max_retries=5) as sdk:
            task = asyncio.create_task(sdk.completions.create(model="demo", prompt="The", max_tokens=2))
            while busy.outcomes("shed_429") == refused:
                await asyncio.sleep(0.02)
            release(streams)
            return await task

    assert asyncio.run(run()).usage.completion_tokens == 2


def load(server):
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def occupy(server, count, key=KEY):
    """`count` endless streams: the first runs, the others wait."""
    sdk = client(server, key=key)
    streams = []
    for expected in range(int(load(server)) + 1, int(load(server)) + 1 + count):
        streams.append(complete(server, sdk=sdk, stream=True, **ENDLESS))
        eventually(lambda expected=expected: load(server) == expected)
    return streams


def release(streams):
    for stream in streams:
        stream.close()


def test_a_stopping_server_finishes_streams(scripted_model):
    server = start(model=scripted_model)
    server.sdk = client(server)
    stream = say(server, "count", stream=True)
    first = next(stream)
    server.process.terminate()
    rest = collect(stream)
    assert (first.choices[0].delta.content or "") + rest.texts[0] == scripted.TEXTS["count"]
    assert rest.reasons == {0: "stop"}
    assert server.process.wait(timeout=60) == 0


def test_a_crowd_of_questions_is_answered(demo):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key=KEY, max_retries=0) as sdk:
            ask = lambda: sdk.chat.completions.create(model="demo", messages=NEEDLE, temperature=0, max_tokens=40)  # noqa: E731
            return await asyncio.gather(*(ask() for _ in range(24)))

    texts = {answer.choices[0].message.content for answer in asyncio.run(run())}
    assert texts == {"The secret code of Lisbon is 48213."}
