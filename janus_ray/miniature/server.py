"""The teacher and the judge as one small OpenAI-compatible HTTP server.

    python -m janus_ray.miniature.server [--host 127.0.0.1] [--port 0] [--api-key KEY] [--latency-ms 0]

It prints the URL it listens on. A job starts it where a recipe says provider = "miniature" (provider.py), with
`--until-stdin-closes`, so that it never outlives the job, however that job ends.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from janus_ray.miniature import judge, teacher
from janus_ray.records import canonical_json, content_id

TEACHER, JUDGE = "miniature-teacher", "miniature-judge"

_ANSWERS: dict[str, Callable[[list[dict[str, str]], int], str]] = {
    TEACHER: teacher.answer,
    JUDGE: lambda messages, seed: judge.verdict(messages[-1]["content"]),
}


def build_app(api_key: str | None = None, latency_s: float = 0.0) -> Any:
    """The ASGI application.

    Args:
        api_key: when given, requests without this bearer token get 401.
        latency_s: seconds to wait before each answer, as a model that thinks would.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def error(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)

    def unauthorised(request: Request) -> bool:
        return api_key is not None and request.headers.get("authorization") != f"Bearer {api_key}"

    async def models(request: Request) -> JSONResponse:
        if unauthorised(request):
            return error(401, "incorrect API key")
        entry = {"object": "model", "created": 0, "owned_by": "janus_ray", "weights_id": _code_id()}
        data = [{"id": name, **entry} for name in _ANSWERS]
        return JSONResponse({"object": "list", "data": data})

    async def chat(request: Request) -> JSONResponse:
        if unauthorised(request):
            return error(401, "incorrect API key")
        try:
            body = json.loads(await request.body())
            messages = [{"role": m["role"], "content": m["content"]} for m in body["messages"]]
            answer = _ANSWERS[body["model"]]
            seed = int(body.get("seed") or 0)
        except KeyError as problem:
            return error(404, f"unknown model or missing field: {problem}")
        except (json.JSONDecodeError, TypeError, ValueError) as problem:
            return error(400, f"not a chat request: {problem}")
        await asyncio.sleep(latency_s)
        return JSONResponse(_completion(body["model"], messages, answer(messages, seed)))

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])],
    )


@cache
def _code_id() -> str:
    """What stands for weights here: the answers change with this package's code and with nothing else."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"miniature {digest.hexdigest()[:16]}"


def _completion(model: str, messages: list[dict[str, str]], text: str) -> dict[str, Any]:
    """The answer in the protocol's form; tokens are counted as words."""
    prompt_tokens = sum(len(message["content"].split()) for message in messages)
    completion_tokens = len(text.split())
    return {
        "id": f"chatcmpl-{content_id(model, canonical_json(messages))}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def main() -> None:
    """Serves until standard input closes."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another one lets other machines in")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--api-key", default=None, help="demand this key")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="wait before each answer")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input closes")
    arguments = parser.parse_args()

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((arguments.host, arguments.port))
    except OSError as problem:
        sys.exit(f"error: {arguments.host}, port {arguments.port} cannot be used: {problem.strerror}")
    listener.listen(4096)
    print(f"http://{arguments.host}:{listener.getsockname()[1]}/v1", flush=True)
    if arguments.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = uvicorn.Config(
        build_app(arguments.api_key, arguments.latency_ms / 1000), log_level="error", access_log=False, backlog=4096
    )
    uvicorn.Server(config).run(sockets=[listener])


def _end_with_stdin() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
