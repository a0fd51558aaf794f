"""Whatever comes over the wire, the client returns an outcome: no exception, and no value that was not there."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from janus_ray.llm.answer import read_answer
from janus_ray.llm.check import listed_models
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.faults import fault_message, kind_of, parsed, rejects_response_format
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, ErrorKind, LLMRequest, Sampling
from janus_ray.llm.retry import RetryPolicy
from janus_ray.llm.thoughts import without_thoughts
from janus_ray.text import well_formed
from tests.loopback import Reply, loopback

OVER_HTTP = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
DIRECTLY = settings(OVER_HTTP, max_examples=80)
NUMBER = itertools.count()
POLICY = RetryPolicy(base_s=1e-6, cap_s=1e-6, told_cap_s=1e-6)

texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["stop", "length", "error", "content_filter", "\ud83d", "<think>", "</think>", "\x00", "429", "402", "json_schema"]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**20, -1, 429, 402, 502, 400, True, False])
keys = st.sampled_from(
    [
        "choices", "message", "content", "text", "type", "refusal", "finish_reason", "usage", "prompt_tokens", "error",
        "completion_tokens", "code", "tool_calls", "reasoning_content", "detail", "metadata", "raw", "param", "loc",
        "msg",
    ]
)  # fmt: skip
values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | texts, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def completions(draw) -> object:
    """A chat completion in which any field may be anything."""
    message = {"content": draw(texts | values), **draw(st.dictionaries(keys, values, max_size=2))}
    choice = {"finish_reason": draw(st.sampled_from(["stop", "length", None]) | values), "message": message}
    usage = {"prompt_tokens": draw(numbers | values), "completion_tokens": draw(numbers)}
    body = {"choices": [choice], "usage": usage, **draw(st.dictionaries(keys, values, max_size=1))}
    return draw(st.just(body) | values)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Asks an endpoint that gives one reply over and over, and returns the outcome."""
    reply = Reply()
    runner = asyncio.Runner()
    with loopback(lambda n, body: reply) as server, runner:
        ledger = Ledger(tmp_path_factory.mktemp("hostile"))
        endpoint = Endpoint(base_url=server.url, model="m", max_attempts=1, max_wait_s=1e-9)

        async def opened() -> ChatClient:
            return ChatClient(endpoint, ledger, retry=POLICY)

        client = runner.run(opened())

        def ask(request: LLMRequest, body: str | bytes, status: int = 200, **headers: str) -> Completion:
            reply.body, reply.status, reply.headers = body, status, headers
            return runner.run(client.complete(request))

        yield ask
        runner.run(client.close())


def looks_sound(outcome: Completion) -> None:
    """The outcome fits the files that it goes into."""
    assert outcome.status in ("ok", "error")
    assert (outcome.status == "ok") == bool(outcome.text.strip()) == (outcome.error_kind is None)
    for text in (outcome.text, outcome.error_message or "-"):
        text.encode()
    assert (outcome.error_message or "-").isprintable()
    assert len(outcome.error_message or "") <= 300
    counts = [outcome.usage.prompt_tokens, outcome.usage.completion_tokens, outcome.attempts, outcome.sent]
    assert all(type(count) is int and count >= 0 for count in counts)
    pa.array(counts, pa.int64())


def strings_in(content) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else [content]
    return [part["text"] if isinstance(part, dict) else part for part in parts if part is not None]


@OVER_HTTP
@given(completions(), st.booleans(), texts)
def test_any_json_is_an_outcome(hostile, body, keep_truncated, prompt):
    request = LLMRequest(
        "test",
        ({"role": "user", "content": prompt},),
        Sampling(max_tokens=4),
        sample_index=next(NUMBER),
        keep_truncated=keep_truncated,
        json_schema={"type": "object"},
    )
    outcome = hostile(request, json.dumps(body))
    looks_sound(outcome)
    assert outcome.sent >= 1
    holds_nothing_else(outcome, body)


@DIRECTLY
@given(completions(), st.booleans())
def test_any_json_is_read(body, keep_truncated):
    outcome = read_answer(json.dumps(body).encode(), keep_truncated=keep_truncated).outcome
    looks_sound(outcome)
    holds_nothing_else(outcome, body)


def holds_nothing_else(outcome: Completion, body: Any) -> None:
    if outcome.status == "ok":
        # Nothing that was not in the content, and nothing from elsewhere in the body.
        choice = body["choices"][0]
        rest = iter(well_formed("".join(strings_in(choice["message"]["content"]))))
        assert all(character in rest for character in outcome.text)
        assert choice.get("finish_reason", "stop") in ("stop", "length")


@DIRECTLY
@given(values, st.integers(100, 999))
def test_any_fault_has_a_kind_and_words(body, status):
    """Of a body in any JSON; what the list of models may be is read as safely."""
    wire = json.dumps(body).encode()
    fault = parsed(wire)
    assert kind_of(status, fault) in get_args(ErrorKind)
    fault_message(status, fault).encode()
    rejects_response_format(status, fault)
    assert all(isinstance(name, str) and name for name in listed_models(wire) or ())


@OVER_HTTP
@given(
    st.binary(max_size=60), st.integers(200, 599).filter(lambda status: status not in (204, 304)), st.text(max_size=6)
)
def test_any_bytes_with_any_status_are_an_outcome(hostile, body, status, words):
    headers = {"retry-after": "".join(c for c in words if c.isascii() and c.isprintable()) or "0"}
    request = LLMRequest("test", ({"role": "user", "content": words},), sample_index=next(NUMBER))
    outcome = hostile(request, body, status, **headers)
    looks_sound(outcome)
    assert outcome.status == "error"


@DIRECTLY
@given(st.lists(texts | st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "`", "a"]), max_size=8))
def test_what_is_shown_of_an_answer_stood_in_it_in_this_order(parts):
    text = "".join(parts)
    told = without_thoughts(text)
    rest = iter(text)
    assert all(character in rest for character in told.text)
    assert told.thoughts != "none" or told.text == text


@contextmanager
def raw_server(reply: bytes) -> Generator[str]:
    """A socket that answers each connection with some bytes, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(65536)
                connection.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        ended.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


BODY = b'{"choices": [{"finish_reason": "stop", "message": {"content": "whole"}}]}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
BROKEN = [
    b"",
    b"\x00\xff",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"HTTP/1.1 OK\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nlocation: http://[/\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nlocation: \xff\xfe:\r\ncontent-length: 0\r\n\r\n",
    HEAD + b"content-length: 9999\r\n\r\n" + BODY,
    HEAD + b"content-length: -1\r\n\r\n" + BODY,
    HEAD + b"transfer-encoding: chunked\r\n\r\n10\r\n" + BODY[:9],
    HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + BODY,
    HEAD + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\nabcd",
    HEAD + b"content-encoding: br\r\ncontent-length: 4\r\n\r\nabcd",
    HEAD + b"content-length: 3\r\n\r\n" + BODY,
]


@pytest.mark.parametrize("reply", BROKEN)
async def test_a_connection_that_breaks_anywhere_is_an_outcome(reply):
    with raw_server(reply) as url:
        client = ChatClient(Endpoint(base_url=url, model="m", max_attempts=1, timeout_s=5), retry=POLICY)
        outcome = await client.complete(LLMRequest("test", ({"role": "user", "content": "hi"},)))
        await client.close()
    looks_sound(outcome)
    assert outcome.error_kind in ("connection", "server"), outcome


async def test_a_character_set_that_does_not_exist_changes_nothing():
    head = HEAD.replace(b"json", b"json; charset=klingon") + f"content-length: {len(BODY)}\r\n\r\n".encode()
    with raw_server(head + BODY) as url:
        client = ChatClient(Endpoint(base_url=url, model="m"))
        assert (await client.complete(LLMRequest("test", ()))).text == "whole"
        await client.close()
