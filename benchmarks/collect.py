"""How full is the endpoint kept? Requests in flight at a loopback endpoint that takes 200 ms for each.

Three ways to send the same 2,688 requests, 64 allowed at once, alternately in one run:

    janus_ray   jobs.collect as it ships: client process, gate, ledger
    defaults    the same client process under Ray Data's default concurrency of an async map_batches
    bare        the same requests from one asyncio loop without Ray: what a client can do at best

The endpoint itself counts what is in flight. The steady window starts when a tenth of the requests has been
answered and ends when nine tenths have. Prints each way's mean share of the limit with its range, the ratios, and
writes benchmarks/results/collect.json.

    python benchmarks/collect.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from janus_ray.config import RayConfig
from janus_ray.data.annotate import Annotator
from janus_ray.data.recipe import CollectRecipe
from janus_ray.data.sources import read_instructions
from janus_ray.env import set_quiet_defaults
from janus_ray.job import keep_native_logs_off_the_terminal
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.miniature.world import instructions
from janus_ray.records import INSTRUCTIONS, Instruction
from janus_ray.store.files import write_json, write_jsonl
from janus_ray.store.folder import git_revision, versions

LIMIT = 64
LATENCY_S = 0.2
RESULT = Path(__file__).parent / "results" / "collect.json"


def serve(port: int) -> None:
    """The endpoint: the miniature's teacher behind a fixed latency, with a log of requests in flight."""
    import uvicorn

    from janus_ray.miniature.server import build_app

    teacher = build_app()
    events: list[tuple[float, int]] = []
    in_flight = 0

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        nonlocal in_flight
        if scope["type"] != "http":
            return await teacher(scope, receive, send)
        if scope["path"] == "/events":
            body = json.dumps(events).encode()
            events.clear()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return await send({"type": "http.response.body", "body": body})
        if scope["path"].endswith("/models"):
            return await teacher(scope, receive, send)
        in_flight += 1
        events.append((time.monotonic(), in_flight))
        try:
            await asyncio.sleep(LATENCY_S)
            await teacher(scope, receive, send)
        finally:
            in_flight -= 1
            events.append((time.monotonic(), in_flight))

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def steady_share(events: list[tuple[float, int]]) -> tuple[float, float, int]:
    """Time-weighted mean in flight as a share of the limit, requests per second, and the peak in flight.

    Share and rate are those of the window between a tenth and nine tenths of the answers.
    """
    answered = [time_s for (_, before), (time_s, now) in pairwise(events) if now < before]
    start, end = answered[len(answered) // 10], answered[len(answered) * 9 // 10]
    area = sum(count * max(0.0, min(after, end) - max(at, start)) for (at, count), (after, _) in pairwise(events))
    rate = sum(start <= time_s < end for time_s in answered) / (end - start)
    return area / (end - start) / LIMIT, rate, max(count for _, count in events)


def run_janus_ray(recipe: CollectRecipe, teacher: Endpoint) -> None:
    """The job's own function, in a process of its own as a user would run it."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"recipe": recipe.model_dump(mode="json")}, file)
        file.flush()
        subprocess.run([sys.executable, __file__, "--collect", file.name], check=True, stdout=subprocess.DEVNULL)


def run_collect_from(path: str) -> None:
    """Child process of `run_janus_ray`."""
    from janus_ray.data.collect import collect

    given = json.loads(Path(path).read_text())
    collect(CollectRecipe.model_validate(given["recipe"]), if_exists="overwrite")


class AnnotateInstructions:
    """The client process as an actor of Ray Data."""

    def __init__(self, *arguments: Any) -> None:
        """Takes what the client process takes."""
        from janus_ray.data.client import AnnotatingClient

        self._process = AnnotatingClient(*arguments)

    async def __call__(self, batch: Any) -> Any:
        """Rows of a batch of instructions."""
        yield (await self._process.answer([Instruction(**row) for row in batch.to_pylist()])).results


def run_defaults(recipe: CollectRecipe, teacher: Endpoint) -> None:
    """The same client process in Ray Data, with blocks and calls as it chooses them."""
    import pyarrow as pa

    from janus_ray.cluster import ray_cluster

    found, _ = read_instructions(recipe.sources)
    with ray_cluster(recipe.ray, 2, "benchmark"):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        table = pa.Table.from_pylist([asdict(instruction) for instruction in found], schema=INSTRUCTIONS)
        arguments = (teacher.model_dump(mode="json"), recipe.output_dir, LIMIT, recipe.model_dump(mode="json"))
        dataset = ray.data.from_arrow(table).map_batches(
            AnnotateInstructions,
            fn_constructor_args=arguments,
            batch_size=16,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        assert dataset.count() == len(found) * recipe.num_sets


def run_bare(recipe: CollectRecipe, teacher: Endpoint) -> None:
    """No Ray: all instructions as coroutines of one loop."""

    async def annotate_all() -> None:
        client = ChatClient(teacher, Ledger(recipe.output_dir), max_concurrency=LIMIT)
        annotator = Annotator(client, recipe)
        await asyncio.gather(*(annotator.rows(instruction) for instruction in read_instructions(recipe.sources)[0]))
        await client.close()

    asyncio.run(annotate_all())


WAYS = {"janus_ray": run_janus_ray, "defaults": run_defaults, "bare": run_bare}


def main() -> None:
    """Runs the rounds and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--collect", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_quiet_defaults()
    keep_native_logs_off_the_terminal()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.collect:
        return run_collect_from(arguments.collect)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        measured = _measure(f"http://127.0.0.1:{port}", arguments.rounds)
    finally:
        server.terminate()
        server.wait()
    _report(measured)


def _measure(url: str, rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    _wait_for(f"{url}/v1/models")
    teacher = Endpoint(base_url=f"{url}/v1", model="miniature-teacher", max_concurrency=LIMIT)
    measured: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for round_number in range(rounds):
        for way, run in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                write_jsonl(Path(folder) / "instructions.jsonl", instructions())
                source = {"path": str(Path(folder) / "instructions.jsonl")}
                recipe = CollectRecipe.model_validate(
                    {
                        "sources": [source],
                        "output_dir": str(Path(folder) / "out"),
                        "teacher": teacher.model_dump(),
                        "ray": RayConfig(logical_cpus=4, object_store_gib=0.5).model_dump(),
                    }
                )
                run(recipe, teacher)
            share, rate, peak = steady_share([tuple(event) for event in _get(f"{url}/events")])
            measured[way].append((share, rate, peak))
            print(f"round {round_number + 1} {way:10} share {share:.3f}  {rate:.0f} requests/s  peak {peak}")
    return measured


def _report(measured: dict[str, list[tuple[float, float, int]]]) -> None:
    shares = {way: [share for share, _, _ in results] for way, results in measured.items()}
    rates = {way: [rate for _, rate, _ in results] for way, results in measured.items()}
    print(f"\nmean share of the limit of {LIMIT} in flight (range over {len(shares['bare'])} rounds):")
    for way, values in shares.items():
        print(f"  {way:10} {statistics.mean(values):.3f}  ({min(values):.3f} to {max(values):.3f})")
    ratios = {}
    for peer in ("defaults", "bare"):
        pairs = [ours / theirs for ours, theirs in zip(rates["janus_ray"], rates[peer], strict=True)]
        ratios[f"janus_ray/{peer}"] = pairs
        print(f"requests/s, janus_ray / {peer}: {statistics.mean(pairs):.2f}  ({min(pairs):.2f} to {max(pairs):.2f})")
    write_json(
        RESULT,
        {
            "limit": LIMIT,
            "latency_s": LATENCY_S,
            "share_of_limit": shares,
            "requests_per_s": rates,
            "ratios": ratios,
            "peak_in_flight": {way: [peak for _, _, peak in results] for way, results in measured.items()},
            "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "git_revision": git_revision(),
        },
    )
    print(f"-> {RESULT}")


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


def _wait_for(url: str, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            _get(url)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the loopback endpoint did not start within {limit_s:g} s")


if __name__ == "__main__":
    main()
