"""What goes wrong behind the endpoint, as a client sees it: refusals of the engine, bursts, and dead processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from tests.local_ray.serve.conftest import MODEL, model_handle, unfinished

USER = {"role": "user", "content": "What do you value?"}
LONG = {"model": MODEL, "messages": [USER], "max_tokens": 900, "ignore_eos": True}


def schema(value: dict) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


# What only the engine can refuse: the size of the vocabulary, what it makes of a schema, the length of the prompt.
ENGINE_REFUSES = [
    ({"logit_bias": {"99999": 5}}, "logit_bias"),
    ({"response_format": schema({"type": "nonsense"})}, "response_format"),
    ({"response_format": schema({"type": "string", "pattern": "("})}, "response_format"),
    # Found out by the compiler in the engine's process only, or by nobody.
    ({"response_format": schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})}, "response_format"),
    ({"response_format": schema({"anyOf": []})}, "response_format"),
    ({"messages": [{"role": "user", "content": "value " * 2000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "value " * 300}], "max_tokens": 800}, "messages"),
    ({"n": 2, "temperature": 0}, "n"),
]


def process(title: str) -> psutil.Process:
    """The one process below this test that calls itself so."""
    found = [child for child in psutil.Process().children(recursive=True) if title in " ".join(child.cmdline())]
    assert len(found) == 1, found
    return found[0]


def ask(url: str, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 3, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_the_engine_refuses_with_a_status_code_and_nothing_of_it_crosses(served):
    for bad, param in ENGINE_REFUSES:
        for stream in (True, False):
            refused = ask(served.url, stream=stream, **bad)
            assert refused.status_code == 400, refused.text
            error = refused.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "engine_refused")
            assert error["message"].isprintable() and not {"Error", "vllm", "validation", "trace"} & set(
                error["message"].replace(":", " ").split()
            )
            assert ask(served.url).status_code == 200
    assert unfinished() == 0
    # Where the engine was imported, torch's libraries are mapped.
    for title in ("ServeReplica:janus:gateway", "ServeController", "ProxyActor"):
        assert "libtorch" not in Path(f"/proc/{process(title).pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{process('ServeReplica:janus:model').pid}/maps").read_text()


async def test_a_burst_is_refused_where_it_costs_least(served):
    """Of 600 at once nearly all are refused by the HTTP proxy: only the gateway's answers carry a request id."""
    size = 600
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> tuple[int, bool]:
            async with session.post(f"{served.url}/v1/chat/completions", json=LONG) as answer:
                text = await answer.text()
                if answer.status == 429:
                    assert json.loads(text)["error"]["code"] == "overloaded" and answer.headers["retry-after"] == "3"
                return answer.status, "x-request-id" in answer.headers

        async with session.get(f"{served.url}/health") as health:
            assert health.status == 200 and "x-janus-room" not in health.headers
        answers = await asyncio.gather(*(one() for _ in range(size)))
        statuses = Counter(status for status, _ in answers)
        # Serve counts what it is still handing to a replica as queued: of those let in, one is sure to be answered.
        assert set(statuses) == {200, 429}
        assert sum(status == 429 and not passed for status, passed in answers) > size / 2
    assert ask(served.url).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_fails_on_its_way_into_the_engine_leaves_no_entry(served, stream):
    """The gateway would refuse this number; the engine lists the request, and then cannot hand it over."""
    answer = model_handle().options(method_name="chat_json", stream=True)
    body = {"model": MODEL, "messages": [USER], "max_tokens": 3, "top_k": 2**70, "stream": stream}
    items = list(answer.remote(body))
    assert [item["error"]["code"] for item in items] == [500]
    assert unfinished() == 0


async def test_callers_that_go_away_at_any_moment_leave_nothing_in_the_engine(served):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        for index in range(40):
            asked = asyncio.create_task(client.post("/v1/chat/completions", json={**LONG, "n": 1 + index % 2}))
            await asyncio.sleep(0.002 * (index % 20))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
    deadline = time.monotonic() + 30
    while await asyncio.to_thread(unfinished) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert await asyncio.to_thread(unfinished) == 0


def test_a_killed_engine_is_named_its_callers_hear_of_it_and_it_comes_back(served):
    with httpx.Client(base_url=served.url, timeout=120) as client:
        with client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            waiting: list[httpx.Response] = []
            waiter = threading.Thread(target=lambda: waiting.append(ask(served.url, **{**LONG, "max_tokens": 800})))
            waiter.start()
            os.kill(process("VLLM::EngineCore").pid, signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "unavailable"
        waiter.join()
        assert waiting[0].status_code == 503 and int(waiting[0].headers["retry-after"]) > 3
        states = _poll_health(client, until={"status": "restarting", "models": {MODEL: "restarting"}})
        assert 503 in states
        refused = ask(served.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "restarting")
        assert int(refused.headers["retry-after"]) > 3
        _poll_health(client, until={"status": "ok", "models": {MODEL: "ready"}})
        assert ask(served.url).status_code == 200


def _poll_health(client: httpx.Client, until: dict) -> list[int]:
    """Every status until /health says what is expected."""
    statuses = []
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        answer = client.get("/health")
        statuses.append(answer.status_code)
        if answer.json() == until:
            return statuses
        time.sleep(0.1)
    pytest.fail(f"/health never said {until}: {answer.text}")
