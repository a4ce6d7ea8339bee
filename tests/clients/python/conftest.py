"""Servers that the tests share. They start when a test first asks for one and must end with exit code 0."""

import os

import openai
import pytest
from harness import scripted
from harness.servers import KEY, Server

BINARY = os.environ["LONGHAUL_BINARY"]


def start(*flags, **options):
    return Server(BINARY, *flags, **options)


def client(server, key=KEY, **options):
    options = {"max_retries": 0, "timeout": 120, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **options)


def shared(*flags, **options):
    server = start(*flags, **options)
    server.sdk = client(server)
    yield server
    server.sdk.close()
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="session")
def demo():
    """The demo model: it finds codes in long texts."""
    yield from shared("--enable-request-id-headers")


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory):
    return scripted.write(tmp_path_factory.mktemp("models") / "scripted")


@pytest.fixture(scope="session")
def script(scripted_model):
    """The model whose every word is known."""
    yield from shared(model=scripted_model)


@pytest.fixture
def busy():
    """A server of one sequence at a time and short queues, for one test."""
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "2", "--max-num-queued-reqs-per-key", "1", "--shutdown-timeout", "0")
    server = start(*flags)
    server.sdk = client(server)
    yield server
    server.sdk.close()
    server.stop()
