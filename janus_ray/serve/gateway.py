"""The gateway: OpenAI's chat API in front of the models, and values turned into system messages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from janus_ray.serve.admission import CHAT_PATH, ROOM_HEADER
from janus_ray.serve.readiness import Readiness
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.serve.refusals import ApiError, overloaded
from janus_ray.serve.requests import parse_chat, parse_preview, unknown_model
from janus_ray.values.wording import system_sha

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = ("style.css", "app.js")
SHA_HEADER = "X-Janus-System-Sha"
IGNORED_HEADER = "X-Janus-Ignored"
_READ = ["GET", "HEAD"]
_MARGIN = 32
_UNAVAILABLE = "unavailable"
# What servers write down where nobody was there to take the answer.
_CALLER_GONE = 499

Item = dict[str, Any] | list[str]


class Backend(Protocol):
    """One model behind the gateway; a deployment handle in service, a few lines in a unit test."""

    def chat(self, body: dict[str, Any]) -> AsyncIterator[Item]:
        """Answers a request: one dictionary, or with `stream` lists of server-sent events.

        Closing the iterator cancels the request.

        Raises:
            Overloaded: no replica has room and the queue is full.
            Unavailable: the replica went away.
        """
        ...


class Overloaded(Exception):
    """The model's queue is full."""


class Unavailable(Exception):
    """The model cannot be reached at the moment."""


class Meter(Protocol):
    """Where a finished request is counted."""

    def __call__(self, model: str, status: int, kind: str, latency_ms: float) -> None:
        """Counts one request by model, HTTP status and kind ("stream" or "plain")."""
        ...


class Api:
    """The HTTP application."""

    def __init__(
        self, recipe: ServeRecipe, backends: Mapping[str, Backend], readiness: Readiness, meter: Meter
    ) -> None:
        """Keeps what the routes need.

        Args:
            recipe: models, limits, and what the page offers.
            backends: by model id.
            readiness: which models can answer; the caller keeps it up to date.
            meter: counts requests.
        """
        self._recipe, self._backends, self._readiness, self._meter = recipe, backends, readiness, meter
        self._order = [model.model_id for model in recipe.models]
        # Where the only replica is gone, there is none before its successor has started.
        self._alone = {model.model_id for model in recipe.models if model.min_replicas == 1}
        self._started = int(time.time())
        self._answering = 0

    @property
    def answering(self) -> int:
        """Chat requests that have not been answered to the end."""
        return self._answering

    def app(self) -> ASGIApp:
        """The routes; everything else is 404 in OpenAI's shape."""
        app = FastAPI(title="janus_ray", docs_url=None, redoc_url=None, openapi_url=None)
        for path, read in (
            ("/health", self.health),
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/v1/janus/personas", self.personas),
            ("/", self.page),
            ("/page/{name}", self.page_file),
        ):
            app.api_route(path, methods=_READ)(read)
        app.post(CHAT_PATH)(self.chat_completions)
        app.post("/v1/janus/preview")(self.preview)
        app.exception_handler(HTTPException)(self.not_here)
        app.exception_handler(ApiError)(self.refused)

        room = (ROOM_HEADER, f"{self._room()}/{self._recipe.retry_after_s}".encode())

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            # Around the whole of an answer: a stream goes on long after its route has returned.
            chats = scope["type"] == "http" and scope["path"] == CHAT_PATH

            async def send_with_room(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", []), room]}
                await send(message)

            self._answering += chats
            try:
                await app(scope, receive, send_with_room)
            finally:
                self._answering -= chats

        return counted

    def _room(self) -> int:
        """Chat requests that all models can take, running and queued, and some that are on their way to be refused."""
        gateways = self._recipe.gateway_replicas
        return _MARGIN + sum(
            model.max_replicas * model.max_ongoing_requests + gateways * model.max_queued_requests
            for model in self._recipe.models
        )

    async def health(self) -> Response:
        """200 while every model can answer, 503 else; with the state of each."""
        status = self._readiness.status()
        body = {"status": status, "models": self._readiness.states()}
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def models(self) -> Response:
        """OpenAI's list of models."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._order]})

    async def model(self, name: str) -> Response:
        """One entry of the list; the id may hold slashes."""
        if name not in self._order:
            raise unknown_model(name, self._order)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        weights_id = self._readiness.weights_ids[name]
        card = {"id": name, "object": "model", "created": self._started, "owned_by": "janus_ray"}
        return {**card, "weights_id": weights_id}

    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's chat completion, plain or streamed, with `janus.preferences` instead of a system message."""
        began, model, kind = time.monotonic(), "unknown", "plain"

        def count(status: int) -> None:
            self._meter(model, status, kind, 1000 * (time.monotonic() - began))

        try:
            parsed = parse_chat(
                await _read_body(request, self._recipe), self._recipe, request.headers.get("content-type")
            )
            model, kind = parsed.model, "stream" if parsed.stream else "plain"
            self._check_ready(model)
            items = self._backends[model].chat(parsed.body)
            first = await self._first_unless_lost(model, items)
        except ApiError as error:
            if error.code == _UNAVAILABLE and model in self._alone:
                error.retry_after_s = self._readiness.retry_after_s(model)
            count(error.status)
            raise
        except asyncio.CancelledError:
            count(_CALLER_GONE)
            raise
        headers = {SHA_HEADER: system_sha(parsed.system)} if parsed.system else {}
        if parsed.ignored:
            headers[IGNORED_HEADER] = ", ".join(parsed.ignored)
        if isinstance(first, dict):
            count(200)
            return JSONResponse(first, headers=headers)
        events = _events(first, items, count)
        return StreamingResponse(events, media_type="text/event-stream", headers={**headers, **_NO_BUFFERING})

    def _check_ready(self, model: str) -> None:
        if self._readiness.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        state = self._readiness.states()[model]
        if state != "ready":
            raise ApiError(
                503, f"model {model!r} is {state}", code=state, retry_after_s=self._readiness.retry_after_s(model)
            )

    async def _first_unless_lost(self, model: str, items: AsyncIterator[Item]) -> Item:
        """The first item of an answer. A request that waits for a replica does not wait for one that is restarting."""
        first = asyncio.ensure_future(_first(items))
        lost = asyncio.ensure_future(self._readiness.lost(model))
        try:
            await asyncio.wait({first, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                self._check_ready(model)
            return await first
        finally:
            first.cancel()
            lost.cancel()

    async def personas(self) -> Response:
        """What the page offers."""
        sets = [
            {"name": persona.name, "preferences": [value.model_dump() for value in persona.values()]}
            for persona in self._recipe.personas
        ]
        return JSONResponse({"personas": sets, "example_prompts": list(self._recipe.example_prompts)})

    async def preview(self, request: Request) -> Response:
        """The system message that a set of values becomes."""
        system = parse_preview(await _read_body(request, self._recipe), request.headers.get("content-type"))
        return JSONResponse({"system": system, "sha": system_sha(system)})

    async def page(self) -> Response:
        """The page to try the models on."""
        return FileResponse(PAGE / "index.html")

    async def page_file(self, name: str) -> Response:
        """The page's style and script."""
        if name not in _PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name)

    async def not_here(self, request: Request, error: HTTPException) -> Response:
        """Unknown paths and methods."""
        path, method = request.url.path, request.method
        text = {404: f"there is no {path} here", 405: f"{path} does not take {method}"}
        answer = await self.refused(request, ApiError(error.status_code, text.get(error.status_code, error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    async def refused(self, _: Request, error: ApiError) -> Response:
        """Every refusal, in OpenAI's shape."""
        wait_s = error.retry_after_s or self._recipe.retry_after_s
        headers = {"Retry-After": str(wait_s)} if error.status in (429, 503) else {}
        return JSONResponse(error.body(), error.status, headers=headers)


_NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_GONE = "the model went away in the middle of the answer"


async def _read_body(request: Request, recipe: ServeRecipe) -> bytes:
    """The body, refused as soon as it is too long."""
    limit = recipe.max_body_kib * 1024
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(413, f"the body is larger than {recipe.max_body_kib} KiB", code="body_too_large")
    except ClientDisconnect:
        raise ApiError(_CALLER_GONE, "the body ended early", code="disconnected") from None
    return bytes(body)


async def _first(items: AsyncIterator[Item]) -> Item:
    """The first item of an answer; until it is there, every failure can still become a status code."""
    try:
        first = await anext(items)
    except Overloaded:
        raise overloaded() from None
    except (Unavailable, StopAsyncIteration):
        raise _unreachable() from None
    if isinstance(first, dict) and "error" in first:
        raise _engine_refusal(first["error"])
    return first


def _unreachable(message: str = "the model cannot be reached at the moment") -> ApiError:
    return ApiError(503, message, code=_UNAVAILABLE)


def _engine_refusal(error: Mapping[str, Any]) -> ApiError:
    """The engine's refusal in our shape; what went wrong inside it stays in its log."""
    status = int(error.get("code") or 500)
    if status == 503:
        return _unreachable()
    if status >= 500:
        return ApiError(status, "the engine failed on this request", code="engine_error")
    return ApiError(status, str(error.get("message")), param=error.get("param"), code="engine_refused")


async def _events(first: list[str], items: AsyncIterator[Item], count: Callable[[int], None]) -> AsyncIterator[str]:
    """Passes server-sent events on. When the client goes away this is closed, and with it the engine's request."""
    status, ended = _CALLER_GONE, None
    try:
        yield "".join(first)
        async for item in items:
            if isinstance(item, dict):
                refusal = _engine_refusal(item["error"])
                ended = _unreachable(_GONE) if refusal.status == 503 else refusal
                break
            yield "".join(item)
        status = 200
    except (Overloaded, Unavailable):
        ended = _unreachable(_GONE)
    finally:
        # Before the last words, which nobody may be there to take.
        count(ended.status if ended else status)
        close = getattr(items, "aclose", None)
        if close:
            await close()
    if ended:
        yield _event(ended.body())
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
