"""A collection whose every request was answered before: instructions, a ledger, an endpoint that is only looked at."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from janus_ray.config import RayConfig
from janus_ray.data.annotate import Annotator
from janus_ray.data.recipe import CollectRecipe
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, LLMRequest, Usage
from janus_ray.miniature import teacher as miniature_teacher
from janus_ray.records import Instruction
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder

MODEL = "teacher"
ACTORS = 2
_RESPONSE = "A response of the length that responses have. " * 40
_PROMPT = "Instruction number {}, and the sixty words or so that an instruction has beside its number. " + "word " * 45


@contextmanager
def endpoint(folder: Path) -> Generator[str]:
    """Lists its model and answers nothing else; a request that is sent is an error of the benchmark.

    On the same port in every step of a folder, because a recipe names it.
    """
    port = folder / "port"

    class Lists(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": MODEL}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", int(port.read_text()) if port.is_file() else 0), Lists) as server:
        port.write_text(str(server.server_port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def recipe_at(folder: Path, url: str) -> CollectRecipe:
    """The collection."""
    return CollectRecipe.model_validate(
        {
            "sources": [{"path": str(folder / "instructions.jsonl")}],
            "output_dir": str(folder / "out"),
            "teacher": {"base_url": url, "model": MODEL, "max_concurrency": 64},
            "client_actors": ACTORS,
            "ray": RayConfig(logical_cpus=ACTORS, object_store_gib=0.3).model_dump(),
        }
    )


def begin(recipe: CollectRecipe) -> None:
    """The folder as a run begins it."""
    refs = {"source_0": Ref.of(recipe.sources[0].path), "teacher": Ref(MODEL, UNKNOWN)}
    RunFolder(recipe.output_dir, recipe, "fail").begin(refs)


def write_instructions(size: int, folder: Path) -> None:
    """The source, line by line."""
    with (folder / "instructions.jsonl").open("w") as stream:
        for number in range(size):
            stream.write(json.dumps({"instruction": _PROMPT.format(number)}) + "\n")


class Remembers:
    """Stands for the client: knows an answer to everything at once, and records it."""

    def __init__(self, target: ReachedEndpoint, ledger: Ledger | None) -> None:
        """Takes the ledger to fill, if any."""
        self._target, self._ledger = target, ledger

    async def complete(self, request: LLMRequest) -> Completion:
        """An answer as the teacher would give it."""
        text = _RESPONSE
        if request.stage != "response":
            text = miniature_teacher.answer(request.messages, request.seed or 0)
        outcome = Completion("ok", text=text, finish_reason="stop", attempts=1, usage=Usage(500, 300), sent=1)
        if self._ledger is not None:
            request = request.without(self._target.omit)
            self._ledger.record(request.key(self._target.model, self._target.identity), outcome)
        return outcome


def rows_of(
    recipe: CollectRecipe, instructions: Iterator[Instruction], ledger: Ledger | None
) -> Iterator[list[dict[str, object]]]:
    """The rows of each instruction, as a client process would have made them."""
    client = Remembers(recipe.teacher.reached(None), ledger)
    annotator = Annotator(client, recipe)  # type: ignore[arg-type]
    for instruction in instructions:
        yield asyncio.run(annotator.rows(instruction))
