"""Opening a ledger: what a resume waits for before its first request, with four client actors.

Every answer has 3 kB. "first" is a ledger without an index, as a crashed run leaves it: the driver looks through it and
writes the index, then four actors open it. "again" is the next resume.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import RayConfig
from janus_ray.llm.ledger import Ledger, index_ledger
from janus_ray.llm.ledger_line import written_line
from janus_ray.llm.request import Completion, Usage

UNIT = "finished requests"
SIZES = (50_000, 200_000)
TARGET = 500_000
_ACTORS = 4
_TEXT = " ".join(hashlib.sha256(str(number).encode()).hexdigest() for number in range(50))[:3000]


def key_of(number: int) -> str:
    """A key as requests have them."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def make(size: int, folder: Path) -> None:
    """Writes the files that four actors would have left."""
    ledger = folder / "ledger"
    ledger.mkdir()
    outcome = Completion("ok", text=_TEXT, finish_reason="stop", attempts=1, usage=Usage(900, 700), sent=1)
    streams = [(ledger / f"{number}.jsonl").open("wb") for number in range(_ACTORS)]
    for number in range(size):
        streams[number % _ACTORS].write(written_line(key_of(number), outcome))
    for stream in streams:
        stream.close()


class Opener:
    """A client actor as far as its ledger goes."""

    def base_mib(self) -> float:
        """Memory before the ledger is opened."""
        return _held_mib()

    def open(self, folder: str, known: int) -> tuple[float, float]:
        """Opens the ledger, reads one answer; seconds and memory afterwards."""
        began = time.monotonic()
        self.ledger = Ledger(folder)
        assert self.ledger.get(key_of(known)) is not None
        return time.monotonic() - began, _held_mib()


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Opens it twice."""
    import ray

    ledger = str(folder / "ledger")
    figures: dict[str, Any] = {}
    with ray_cluster(RayConfig(logical_cpus=_ACTORS, object_store_gib=0.2), _ACTORS, "benchmark"):
        actor_type: Any = ray.remote(num_cpus=1)(Opener)
        for when in ("first", "again"):
            actors = [actor_type.remote() for _ in range(_ACTORS)]
            before = sum(ray.get([actor.base_mib.remote() for actor in actors]))
            began = time.monotonic()
            index_ledger(ledger)
            driver_s = time.monotonic() - began
            opened = ray.get([actor.open.remote(ledger, size // 2) for actor in actors])
            figures[f"{when}_start_s"] = time.monotonic() - began
            figures[f"{when}_driver_s"] = driver_s
            figures[f"{when}_actors_added_mib"] = sum(held for _, held in opened) - before
            for actor in actors:
                ray.kill(actor)
    return {"wall_s": figures["first_start_s"], **figures}


def _held_mib() -> float:
    import psutil

    return psutil.Process().memory_full_info().pss / 1024**2
