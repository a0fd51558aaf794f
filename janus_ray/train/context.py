"""Where a training loop runs, as it sees it: under Ray Train, or in processes of this machine without Ray.

The loop takes a `Context` and imports no Ray, so that whatever must not depend on the number of workers is tested in
seconds.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from janus_ray.errors import JanusError

if TYPE_CHECKING:
    import torch

# Seconds of imports; transformers has most of its own at the first use of a name.
_PRELOADED = [
    "janus_ray.train.loop",
    "janus_ray.train.checkpoint_storage",
    "torch.distributed.checkpoint.staging",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "accelerate",
]

Record = Mapping[str, Any]
"""A line of metrics, JSON-ready."""


class Context(Protocol):
    """What a worker knows of where it runs. The process group is there already; rank and world size are its."""

    @property
    def device(self) -> torch.device:
        """This worker's device."""
        ...

    def report(self, record: Record) -> None:
        """Tells whoever follows the run; rank 0 does, and never waits for it."""
        ...


class LocalContext:
    """A process of this machine with a CPU."""

    def __init__(self, report: Callable[[Record], None] | None = None) -> None:
        """Takes who is told of each line of metrics, if anybody."""
        import torch

        self.device = torch.device("cpu")
        self._report = report

    def report(self, record: Record) -> None:
        """Tells them."""
        if self._report is not None:
            self._report(record)


# What one rank does: (context, *arguments) -> result.
Work = Callable[..., Any]


class LocalWorkers:
    """Processes that wait for work; each time some of them form a process group of their own."""

    def __init__(self, threads: int = 1) -> None:
        """Starts nothing yet.

        Args:
            threads: of the arithmetic in each process.
        """
        self._threads = threads
        # A server that has imported everything once is copied for each process.
        self._start = multiprocessing.get_context("forkserver")
        self._start.set_forkserver_preload(_PRELOADED)

    def run(self, num_workers: int, work: Work, *arguments: Any) -> list[Any]:
        """Does the work on all ranks of a new process group, and returns what each returned.

        Args:
            num_workers: how many ranks.
            work: a function of a module, called with a `LocalContext` and the arguments on every rank.
            arguments: what pickle takes.

        Raises:
            JanusError: a rank raised it.
            BrokenProcessPool: a rank's process ended.
            Exception: whatever else a rank raised. The others fail as a consequence.
        """
        pool = ProcessPoolExecutor(num_workers, mp_context=self._start)
        with tempfile.TemporaryDirectory(prefix="janus_ray-") as folder, pool:
            ranks = [
                pool.submit(_rank, str(Path(folder, "group")), rank, num_workers, self._threads, work, arguments)
                for rank in range(num_workers)
            ]
            wait(ranks)
        failures = [error for each in ranks if (error := each.exception())]
        for kind in (JanusError, BrokenProcessPool, BaseException):
            for error in failures:
                if isinstance(error, kind):
                    raise error
        return [each.result() for each in ranks]


def _rank(store: str, rank: int, world_size: int, threads: int, work: Work, arguments: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(threads)
    with process_group(store, rank, world_size):
        return work(LocalContext(), *arguments)


@contextmanager
def process_group(store: str, rank: int, world_size: int) -> Generator[None]:
    """A gloo process group that meets through a file.

    Args:
        store: the file's path; the same for all ranks, and no other group's.
        rank: of this process.
        world_size: how many there are.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        # Whoever waits for this rank learns that it is gone.
        dist.destroy_process_group()
