"""A loopback Hugging Face hub: the routes that fetching a model or a dataset asks, with files that a test decides."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@dataclass
class Repository:
    """One model or dataset. A gated one answers only to its token and says so, a private one hides itself."""

    name: str
    files: dict[str, bytes]
    kind: str = "model"
    gated: bool = False
    private: bool = False
    token: str = "hf_right"
    status: int = 200
    """Answer everything with this status."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content + b"\0")
        return digest.hexdigest()


@dataclass
class Hub:
    """A running hub: its address, what it holds, and the paths that were asked for, in order."""

    url: str
    repositories: list[Repository]
    requests: list[str] = field(default_factory=list)

    def environment(self, cache: Path) -> dict[str, str]:
        """What a job needs in its environment to use this hub and a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files below a folder, as a repository takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def hub(*repositories: Repository) -> Generator[Hub]:
    """Serves the repositories on a free port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    state = Hub(f"http://127.0.0.1:{listener.getsockname()[1]}", list(repositories))
    server = uvicorn.Server(uvicorn.Config(_app(state), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield state
    finally:
        # Clients keep connections open; nobody waits for them.
        server.should_exit = server.force_exit = True
        thread.join()


@contextmanager
def reached(monkeypatch: pytest.MonkeyPatch, cache: Path, *repositories: Repository) -> Generator[Hub]:
    """Serves the repositories, and has this process use them and a cache of its own."""
    from huggingface_hub import constants

    with hub(*repositories) as state:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The library reads its address once, when it is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, state.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        for name, value in state.environment(cache).items():
            monkeypatch.setenv(name, value)
        yield state


def _app(state: Hub) -> Starlette:
    def route(path: str, answer: Callable[[Request, Repository], Response]) -> Route:
        async def endpoint(request: Request) -> Response:
            found = _find(state, request)
            return found if isinstance(found, Response) else answer(request, found)

        return Route(path, endpoint)

    return Starlette(
        routes=[
            route("/api/{kind}/{org}/{name}", _info),
            route("/api/{kind}/{org}/{name}/revision/{revision:path}", _info),
            route("/api/{kind}/{org}/{name}/tree/{revision}", _tree),
            route("/{org}/{name}/resolve/{revision}/{file:path}", _resolve),
            route("/{kind}/{org}/{name}/resolve/{revision}/{file:path}", _resolve),
        ]
    )


def _info(request: Request, found: Repository) -> Response:
    siblings = [{"rfilename": name} for name in sorted(found.files)]
    body: dict[str, Any] = {"id": found.name, "sha": found.commit, "siblings": siblings, "gated": found.gated}
    return JSONResponse({**body, "private": found.private, "tags": [], "downloads": 0, "likes": 0})


def _tree(request: Request, found: Repository) -> Response:
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in sorted(found.files.items())
    ]
    return JSONResponse(entries)


def _resolve(request: Request, found: Repository) -> Response:
    if found.gated and _token(request) != found.token:
        return _error(403 if _token(request) else 401, "GatedRepo")
    content = found.files.get(request.path_params["file"])
    if content is None:
        return _error(404, "EntryNotFound")
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found.commit}
    return Response(content, headers=headers, media_type="application/octet-stream")


def _find(state: Hub, request: Request) -> Repository | Response:
    state.requests.append(request.url.path)
    kind = request.path_params.get("kind", "models").removesuffix("s")
    name = f"{request.path_params['org']}/{request.path_params['name']}"
    found = next((one for one in state.repositories if (one.kind, one.name) == (kind, name)), None)
    if found is None or (found.private and _token(request) != found.token):
        return _error(404, "RepoNotFound")
    if found.status != 200:
        return _error(found.status, "")
    if request.path_params.get("revision", "main") not in ("main", found.commit):
        return _error(404, "RevisionNotFound")
    return found


def _token(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _error(status: int, code: str) -> Response:
    return JSONResponse({"error": code}, status, {"X-Error-Code": code} if code else {})
