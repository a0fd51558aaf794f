"""The gateway: OpenAI's chat API in front of the models, and values turned into system messages."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from janus_ray.serve.recipe import ServeRecipe
from janus_ray.serve.requests import ApiError, parse_chat, parse_preview
from janus_ray.serve.verbalise import system_sha

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = ("style.css", "app.js")
SHA_HEADER = "X-Janus-System-Sha"

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

    def __init__(self, recipe: ServeRecipe, backends: Mapping[str, Backend], ready: set[str], meter: Meter) -> None:
        """Keeps what the routes need.

        Args:
            recipe: models, limits, and what the page offers.
            backends: by model id.
            ready: model ids that have answered their first request; the caller adds to it.
            meter: counts requests.
        """
        self._recipe, self._backends, self._ready, self._meter = recipe, backends, ready, meter
        self._order = [model.model_id for model in recipe.models]
        self._started = int(time.time())

    def app(self) -> FastAPI:
        """The routes; everything else is 404 in OpenAI's shape."""
        app = FastAPI(title="janus_ray", docs_url=None, redoc_url=None, openapi_url=None)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.get("/v1/janus/personas")(self.personas)
        app.post("/v1/janus/preview")(self.preview)
        app.get("/")(self.page)
        app.get("/page/{name}")(self.page_file)
        app.exception_handler(HTTPException)(self.not_here)
        app.exception_handler(ApiError)(self.refused)
        return app

    async def health(self) -> Response:
        """200 once every model has answered, 503 before."""
        states = {name: "ready" if name in self._ready else "starting" for name in self._order}
        up = self._ready.issuperset(self._order)
        return JSONResponse({"status": "ok" if up else "starting", "models": states}, 200 if up else 503)

    async def models(self) -> Response:
        """OpenAI's list of models."""
        card = {"object": "model", "created": self._started, "owned_by": "janus_ray"}
        return JSONResponse({"object": "list", "data": [{"id": name, **card} for name in self._order]})

    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's chat completion, plain or streamed, with `janus.preferences` instead of a system message."""
        began, model, kind = time.monotonic(), "unknown", "plain"

        def count(status: int) -> None:
            self._meter(model, status, kind, 1000 * (time.monotonic() - began))

        try:
            parsed = parse_chat(await _read_body(request, self._recipe), self._recipe)
            model, kind = parsed.model, "stream" if parsed.stream else "plain"
            if model not in self._ready:
                raise ApiError(503, f"model {model!r} is starting", code="starting")
            items = self._backends[model].chat(parsed.body)
            first = await _first(items)
        except ApiError as error:
            count(error.status)
            raise
        headers = {SHA_HEADER: system_sha(parsed.system)} if parsed.system else {}
        if isinstance(first, dict):
            count(200)
            return JSONResponse(first, headers=headers)
        events = _events(first, items, count)
        return StreamingResponse(events, media_type="text/event-stream", headers={**headers, **_NO_BUFFERING})

    async def personas(self) -> Response:
        """What the page offers."""
        sets = [
            {"name": persona.name, "preferences": [value.model_dump() for value in persona.values()]}
            for persona in self._recipe.personas
        ]
        return JSONResponse({"personas": sets, "example_prompts": list(self._recipe.example_prompts)})

    async def preview(self, request: Request) -> Response:
        """The system message that a set of values becomes."""
        system = parse_preview(await _read_body(request, self._recipe))
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
        return await self.refused(request, ApiError(error.status_code, text.get(error.status_code, error.detail)))

    async def refused(self, _: Request, error: ApiError) -> Response:
        """Every refusal, in OpenAI's shape."""
        headers = {"Retry-After": str(self._recipe.retry_after_s)} if error.status in (429, 503) else {}
        return JSONResponse(error.body(), error.status, headers=headers)


_NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _read_body(request: Request, recipe: ServeRecipe) -> bytes:
    """The body, refused as soon as it is too long."""
    limit = recipe.max_body_kib * 1024
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {recipe.max_body_kib} KiB", code="body_too_large")
    return bytes(body)


async def _first(items: AsyncIterator[Item]) -> Item:
    """The first item of an answer; until it is there, every failure can still become a status code."""
    try:
        first = await anext(items)
    except Overloaded:
        raise ApiError(429, "every replica is busy and the queue is full", code="overloaded") from None
    except (Unavailable, StopAsyncIteration):
        raise ApiError(503, "the model cannot be reached at the moment", code="unavailable") from None
    if isinstance(first, dict) and "error" in first:
        raise _engine_refusal(first["error"])
    return first


def _engine_refusal(error: Mapping[str, Any]) -> ApiError:
    """The engine's refusal in our shape; what went wrong inside it stays in its log."""
    status = int(error.get("code") or 500)
    if status >= 500:
        return ApiError(status, "the engine failed on this request", code="engine_error")
    return ApiError(status, str(error.get("message")), param=error.get("param"), code="engine_refused")


async def _events(first: list[str], items: AsyncIterator[Item], count: Callable[[int], None]) -> AsyncIterator[str]:
    """Passes server-sent events on. When the client goes away this is closed, and with it the engine's request."""
    status = 499
    try:
        yield "".join(first)
        async for item in items:
            yield "".join(item) if isinstance(item, list) else _event(_engine_refusal(item["error"]).body())
        status = 200
    except (Overloaded, Unavailable):
        status = 503
        yield _event(ApiError(503, "the model went away in the middle of the answer", code="unavailable").body())
        yield "data: [DONE]\n\n"
    finally:
        count(status)
        close = getattr(items, "aclose", None)
        if close:
            await close()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
