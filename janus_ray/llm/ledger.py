"""The ledger: every finished request, on disk before its row moves on, so that nothing is paid twice.

One append-only log per client process, written line by line (store/log.py says what a killed process may lose on an
object storage; on a file system nothing). A line that is not a record is skipped, a torn one included. All files of the
folder are read together; a success hides earlier errors. Errors are not answered from the ledger, a rerun tries them
again; only those that the same request is sure to meet again (request.FINAL_KINDS) are.

In memory lies where each answer is (ledger_index.py), not what it says.
"""

from __future__ import annotations

import os
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Generic, TypeVar

from upath import UPath

from janus_ray.errors import DataError
from janus_ray.llm.ledger_index import LedgerIndex, Place, digest_of
from janus_ray.llm.ledger_line import parsed_line, written_line
from janus_ray.llm.request import FINAL_KINDS, Completion
from janus_ray.store.files import read_bytes
from janus_ray.store.location import is_local, location
from janus_ray.store.log import ENDING, AppendLog

# Objects of a storage are kept after a line of theirs was read: its neighbours are wanted next.
_OBJECT_BYTES = 32 * 1024**2
_RECENT_BYTES = 16 * 1024**2
Name = TypeVar("Name", str, bytes)


class Ledger:
    """Reads what earlier runs finished, appends what this one does."""

    def __init__(self, folder: Path | UPath | str) -> None:
        """Looks through the folder; the log for appending is made with the first record.

        Raises:
            DataError: a file of the folder cannot be read.
        """
        self._folder = location(folder)
        self._index = LedgerIndex(self._folder)
        self._objects = _Kept[str](_OBJECT_BYTES)
        self.skipped = self._index.skipped
        """Lines that are no records."""
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._log = AppendLog(self._folder, name)
        self._file = f"{name}{ENDING}"
        self._length = 0
        self._failed: DataError | None = None
        # What this process recorded, and where; on an object storage only the log knows: lines are kept for a while.
        self._own: dict[bytes, Place] = {}
        self._recent = _Kept[bytes](_RECENT_BYTES)

    def __len__(self) -> int:
        """Number of requests answered successfully so far."""
        before = (self._index.find(digest) for digest, place in self._own.items() if place.ok)
        return self._index.num_ok + sum(place is None or not place.ok for place in before)

    def get(self, key: str) -> Completion | None:
        """The outcome recorded for a key, if it needs no further request.

        Raises:
            DataError: a record cannot be read; or one could not be written: nothing more should be paid for.
        """
        digest = digest_of(key)
        place = self._own.get(digest) or self._index.find(digest)
        record = parsed_line(self._line(digest, place)) if place else None
        if record is not None and record.key == key:
            return record.completion()
        if self._failed:
            raise self._failed
        return None

    def record(self, key: str, completion: Completion) -> None:
        """Appends an outcome and hands it to the storage; on a file system a killed process loses nothing.

        Raises:
            DataError: it cannot be written. What was recorded before stays readable.
        """
        line = written_line(key, completion)
        try:
            self._log.append(line)
        except DataError as error:
            do = "make room there, then run" if is_local(self._folder) else "run"
            self._failed = DataError(
                f"an answer cannot be recorded: {error}; {do} again with --if-exists resume: what was recorded is not "
                "asked for again"
            )
            raise self._failed from None
        place = Place(self._file, self._length, len(line), completion.status == "ok")
        self._length += len(line)
        digest = digest_of(key)
        known = self._own.get(digest) or self._index.find(digest)
        if place.ok or (completion.error_kind in FINAL_KINDS and not known):
            self._own[digest] = place
            if not is_local(self._folder):
                self._recent.keep(digest, line)

    def flush(self) -> None:
        """Returns when every record is where another process can read it.

        Raises:
            DataError: one cannot be written.
        """
        self._log.flush()

    def close(self) -> None:
        """Flushes, and ends this process's log.

        Raises:
            DataError: a record cannot be written.
        """
        self._log.close()

    def _line(self, digest: bytes, place: Place) -> bytes:
        if is_local(self._folder):
            return read_bytes(self._folder / place.file, place.offset, place.offset + place.length)
        if (line := self._recent.get(digest)) is not None:
            return line
        if place.file == self._file:
            # Only now somebody asks for what was recorded long ago.
            self._log.flush()
            self._index, self._own = LedgerIndex(self._folder), {}
            found = self._index.find(digest)
            assert found is not None, f"{self._folder}: what was recorded is not there"
            place = found
        content = self._objects.get(place.file)
        if content is None or len(content) < place.offset + place.length:
            content = read_bytes(self._folder / place.file)
            self._objects.keep(place.file, content)
        return content[place.offset : place.offset + place.length]


class _Kept(Generic[Name]):
    """Contents that were used last, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._contents: OrderedDict[Name, bytes] = OrderedDict()

    def get(self, name: Name) -> bytes | None:
        if name in self._contents:
            self._contents.move_to_end(name)
        return self._contents.get(name)

    def keep(self, name: Name, content: bytes) -> None:
        self._held_bytes += len(content) - len(self._contents.pop(name, b""))
        self._contents[name] = content
        while self._held_bytes > self._most_bytes and len(self._contents) > 1:
            self._held_bytes -= len(self._contents.popitem(last=False)[1])


def index_ledger(folder: Path | UPath | str, worth_lines: int = 1000) -> None:
    """Keeps where the answers lie in a file of the folder, so that nobody who opens the ledger has to look for them.

    Args:
        folder: the ledger's folder; there may be none yet.
        worth_lines: fewer new lines than this are read again each time, faster than a file is written.

    Raises:
        DataError: a file of the folder cannot be read, or the index not be written.
    """
    index = LedgerIndex(location(folder))
    if index.new_lines >= worth_lines:
        index.write()


def count_finished(folder: Path | UPath | str) -> int:
    """Number of distinct requests with a successful outcome in a ledger folder.

    Raises:
        DataError: a file of the folder cannot be read.
    """
    return LedgerIndex(location(folder)).num_ok
