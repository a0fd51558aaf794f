"""A loopback endpoint whose every answer a test decides: status, body, headers, delay."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_HOLD_S = 60.0


@dataclass
class Reply:
    """What the endpoint answers; text and bytes go out as they are, a dict or a list as JSON."""

    body: dict[str, Any] | list[Any] | str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


@dataclass
class Loopback:
    """A running endpoint: its URL and every chat request it got, in order."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    peak_in_flight: int = 0
    gave_up_holding: bool = False
    """The number of requests that answers were held for never came together."""


def chat_reply(text: str, finish_reason: str = "stop", **changes: Any) -> Reply:
    """A well-formed completion."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    return Reply({**body, **changes})


def as_response(reply: Reply) -> Response:
    if isinstance(reply.body, dict | list):
        return JSONResponse(reply.body, reply.status, reply.headers)
    return Response(reply.body, reply.status, {"content-type": "application/json", **reply.headers})


@contextmanager
def loopback(
    answer: Callable[[int, dict[str, Any]], Reply],
    models: tuple[str, ...] | Reply = ("m",),
    models_status: int = 200,
    held_until_in_flight: int = 0,
) -> Generator[Loopback]:
    """Serves on a free port; `answer` gets the number of the chat request and its body.

    With `held_until_in_flight` no answer goes out before that many requests have been there at once, and again after
    `peak_in_flight` was set back.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    state = Loopback(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    in_flight = 0

    async def chat(request: Request) -> Response:
        nonlocal in_flight
        body = json.loads(await request.body())
        state.requests.append(body)
        reply = answer(len(state.requests) - 1, body)
        in_flight += 1
        state.peak_in_flight = max(state.peak_in_flight, in_flight)
        deadline = time.monotonic() + _HOLD_S
        while state.peak_in_flight < held_until_in_flight and not state.gave_up_holding:
            state.gave_up_holding = time.monotonic() > deadline
            await asyncio.sleep(0.01)
        await asyncio.sleep(reply.delay_s)
        in_flight -= 1
        return as_response(reply)

    async def list_models(request: Request) -> Response:
        if isinstance(models, Reply):
            return as_response(models)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "t"} for name in models]
        return JSONResponse({"object": "list", "data": data}, models_status)

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", list_models)])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join()
