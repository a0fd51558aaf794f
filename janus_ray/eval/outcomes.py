"""Answers between their arrival and their row: on this machine's disk, found by number.

Answers come in any order, and rows are written in the bench's, so that two runs write the same files. Held in memory
until then, they would be what an evaluation's memory grows with.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from upath import UPath

from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.fanout import ask_all
from janus_ray.llm.request import Completion, LLMRequest, Usage
from janus_ray.store.location import is_local


@contextmanager
def kept_outcomes(folder: UPath) -> Generator[Outcomes]:
    """Outcomes that are gone with the block; the ledger has what was paid for.

    Args:
        folder: where they lie, if it is on this machine; they lie in the temporary folder otherwise.
    """
    with tempfile.TemporaryFile(dir=str(folder) if is_local(folder) else None) as file:
        yield Outcomes(file.fileno())


class Outcomes:
    """Completions by number."""

    def __init__(self, file: int) -> None:
        """Takes an empty file that is open for reading and writing."""
        self._file = file
        self._end = 0
        self._starts, self._lengths = array("q"), array("q")

    def put(self, number: int, completion: Completion) -> None:
        """Keeps a completion, in place of what had the number before.

        Raises:
            OSError: there is no room.
        """
        content = json.dumps(asdict(completion)).encode()
        if os.pwrite(self._file, content, self._end) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if (missing := number + 1 - len(self._starts)) > 0:
            self._starts.extend([0] * missing)
            self._lengths.extend([0] * missing)
        self._starts[number], self._lengths[number] = self._end, len(content)
        self._end += len(content)

    def get(self, number: int) -> Completion | None:
        """The completion of a number; None where there is none."""
        length = self._lengths[number] if number < len(self._lengths) else 0
        if not length:
            return None
        values = json.loads(os.pread(self._file, length, self._starts[number]))
        usage = Usage(**values.pop("usage"))
        return Completion(**values, usage=usage)

    def of(self, number: int) -> Completion:
        """The completion of a number that was asked."""
        completion = self.get(number)
        assert completion is not None, number
        return completion

    def asked(
        self,
        requests: Iterable[tuple[int, LLMRequest]],
        target: ReachedEndpoint,
        ledger: UPath,
        num_actors: int,
        label: str,
        total: int,
    ) -> Iterator[tuple[int, Completion]]:
        """Asks numbered requests, keeps their outcomes, and yields them as they come; see `llm.fanout.ask_all`."""
        numbered = (replace(request, custom_id=str(number)) for number, request in requests)
        for request, completion in ask_all(numbered, target, str(ledger.absolute()), num_actors, label, total=total):
            number = int(request.custom_id)
            self.put(number, completion)
            yield number, completion
