"""Refuses what a full server cannot take, in Serve's HTTP proxy: before a request costs anything.

A request's way from the proxy to the gateway and back takes about 5 ms of CPU time over both processes. Six hundred
that arrive at once would all walk it, only to be refused, and everybody else, /health included, would wait behind them
for seconds. So the proxy counts the chat requests that are on their way. Above what all models together can take it
answers 429 itself. How much that is the gateway says in a header of its answers; until the first of them nothing is
refused here.

Serve loads this through RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (env.py); on a cluster where somebody else started
Serve without it the gateway alone refuses, later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from janus_ray.metrics import GATEWAY_REFUSED_EARLY, instrument
from janus_ray.serve.refusals import ApiError, overloaded

if TYPE_CHECKING:
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHAT_PATH = "/v1/chat/completions"
_PATHS = (CHAT_PATH, "/v1/models", "/health")
_SERVES_ERRORS = (404, 500, 502, 503)
# "requests/seconds": how many chat requests the gateway takes, and after how long those above may come back.
ROOM_HEADER = b"x-janus-room"


def proxy_middlewares() -> list[Middleware]:
    """Called by Serve's HTTP proxy at its start."""
    from ray.util import metrics
    from starlette.middleware import Middleware

    return [Middleware(Admission, count=instrument(GATEWAY_REFUSED_EARLY, metrics).inc)]


class Admission:
    """ASGI middleware that counts chat requests and refuses those above the gateway's room."""

    def __init__(self, app: ASGIApp, count: Callable[[], None]) -> None:
        """Takes the application behind it, and what counts a refusal."""
        self._app, self._count = app, count
        self._inside = 0
        self._room: int | None = None
        self._retry_after_s = 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request on, or refuses it."""
        path = scope["path"] if scope["type"] == "http" else None
        if path not in _PATHS:
            await self._app(scope, receive, self._learning(send))
        elif path != CHAT_PATH:
            await self._passed_on(scope, receive, send)
        elif self._room is not None and self._inside >= self._room:
            self._count()
            await self._refuse(send, overloaded())
        else:
            self._inside += 1
            try:
                await self._passed_on(scope, receive, send)
            finally:
                self._inside -= 1

    def _learning(self, send: Send) -> Send:
        async def learning(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._learnt(message.get("headers", []))}
            await send(message)

        return learning

    async def _passed_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on. Where Serve answers in the place of a gateway that has died, its words are replaced."""
        learning, answered, of_serve = self._learning(send), False, False

        async def ours(message: Message) -> None:
            nonlocal answered, of_serve
            answered = True
            if message["type"] == "http.response.start" and message["status"] in _SERVES_ERRORS:
                names = [name.lower() for name, _ in message.get("headers", [])]
                of_serve = self._room is not None and ROOM_HEADER not in names
            if not of_serve:
                await learning(message)

        await self._app(scope, receive, ours)
        # Of a gateway that died with the request in its hands Serve says nothing at all; uvicorn would make it a 500.
        if of_serve or not answered:
            await self._refuse(send, ApiError(503, "the gateway cannot be reached at the moment", code="unavailable"))

    def _learnt(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers of an answer without ours, which is read."""
        kept = []
        for name, value in headers:
            if name.lower() == ROOM_HEADER:
                room, _, retry_after_s = value.partition(b"/")
                self._room, self._retry_after_s = int(room), int(retry_after_s)
            else:
                kept.append((name, value))
        return kept

    async def _refuse(self, send: Send, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(self._retry_after_s).encode()),
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
