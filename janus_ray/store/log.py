"""Append-only logs of lines: a file opened for append on a file system, segments on an object storage.

On a file system a line is with the operating system before `append` returns, so a killed process loses nothing. An
object storage cannot append: the lines of a log are gathered and its last segment is written again whole, twice a
second while there is something new, and when the process ends in any way but `kill -9`, which so loses the lines of at
most one second (and those that a storage in trouble has not taken yet). A full segment is never written again.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.files import Found, files_below, read_bytes, write_bytes
from janus_ray.store.location import is_local, location, one_line_errors, os_reason

ENDING = ".jsonl"
# Half of the second that may be lost: the other half is for the request itself.
_HELD_BACK_S = 0.5
# A segment is sent again while it grows, so it is small; and there are few enough to read a day's work in a minute.
_SEGMENT_BYTES = 1024**2
_READ_AT_ONCE = 16


class Line(NamedTuple):
    """A line of a log and where it stands."""

    file: UPath
    offset: int
    """Its first byte in the file."""
    content: bytes
    """Without the line's end. The last one of a file may be torn, if its process was killed in the middle of it."""


class AppendLog:
    """Lines that one process appends; several logs may lie in one folder, each under its own name."""

    def __init__(self, folder: Path | UPath | str, name: str) -> None:
        """Nothing is made before the first line.

        Args:
            folder: where the log lies, with others.
            name: its name there, without an ending. A log of that name that exists is continued.
        """
        folder = location(folder)
        self._sink: _File | _Segments = (
            _File(folder / f"{name}{ENDING}") if is_local(folder) else _Segments(folder, name)
        )

    def append(self, line: bytes) -> None:
        """Appends one line, which ends with a line break. On an object storage it takes no lock and waits for nothing.

        Raises:
            DataError: it cannot be written or, on an object storage, an earlier one could not. Whole lines written
                before stay readable.
        """
        assert line.endswith(b"\n") and b"\n" not in line[:-1]
        self._sink.append(line)

    def flush(self) -> None:
        """Returns when every line is where another process can read it.

        Raises:
            DataError: one cannot be written.
        """
        self._sink.flush()

    def close(self) -> None:
        """Flushes and ends the log.

        Raises:
            DataError: as `flush`.
        """
        self._sink.close()


class _File:
    """A file that is appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def append(self, line: bytes) -> None:
        """Writes a whole line or, where there is no room for it, none of it."""
        try:
            if self._file is None:
                self._file = self._opened()
            end = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:
                # A torn line would swallow the next one.
                os.ftruncate(self._file, end)
                raise
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    def _opened(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        end = os.fstat(file).st_size
        # An earlier process was killed in the middle of its last line.
        if end and os.pread(file, 1, end - 1) != b"\n":
            os.write(file, b"\n")
        return file

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Segments:
    """Objects of which the last grows."""

    def __init__(self, folder: UPath, name: str) -> None:
        self._folder = folder
        self._name = name
        # Appended to without a lock, because a signal may come in the middle of it and then wants to flush.
        self._waiting: deque[bytes] = deque()
        self._segment = b""
        self._number: int | None = None
        self._failed: DataError | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def append(self, line: bytes) -> None:
        self._waiting.append(line)
        if self._failed:
            raise self._failed
        if self._thread is None:
            self._thread = threading.Thread(target=self._flush_often, name=f"log {self._name}", daemon=True)
            self._thread.start()
            _open_logs.add(self)

    def _flush_often(self) -> None:
        while not self._closed.wait(_HELD_BACK_S):
            # Who appends next is told.
            with suppress(DataError):
                self.flush()

    def flush(self) -> None:
        with self._writing:
            if self._waiting or self._failed:
                self._write()

    def _write(self) -> None:
        """Writes the last segment with what is new; what cannot be written now is tried again with the next flush."""
        lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
        self._segment += b"".join(lines)
        try:
            if self._number is None:
                self._number = self._first_free()
            write_bytes(self._folder / f"{self._name}-{self._number:06d}{ENDING}", self._segment)
        except DataError as error:
            self._failed = error
            raise
        self._failed = None
        if len(self._segment) >= _SEGMENT_BYTES:
            self._segment, self._number = b"", self._number + 1

    def _first_free(self) -> int:
        prefix = f"{self._name}-"
        numbers = [
            found.name.removeprefix(prefix).removesuffix(ENDING)
            for found in files_below(self._folder, deep=False)
            if found.name.startswith(prefix) and found.name.endswith(ENDING)
        ]
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _open_logs.discard(self)
        self.flush()


_open_logs: weakref.WeakSet[_Segments] = weakref.WeakSet()
_callbacks: list[Callable[[], None]] = []
_afterwards: list[Callable[[], None]] = []


@contextmanager
def flushed_at_the_end(callback: Callable[[], None]) -> Generator[None]:
    """While the block runs, what ends this process calls this first: it has other processes flush their logs.

    Args:
        callback: called in another thread than the main one, where `flush_all` is.
    """
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


def after_the_flush(act: Callable[[], None]) -> None:
    """Has this called at the end of the process, once the logs are written."""
    _afterwards.append(act)


def flush_all(longest_s: float = 10.0) -> None:
    """Writes what the logs of this process hold back, has others do so, and lets go; for whatever ends the process.

    Never raises: whatever is wrong with the storage, the process ends.
    """

    def flush(log: _Segments) -> None:
        with suppress(DataError):
            log.flush()

    _run([*_callbacks, *(lambda log=log: flush(log) for log in list(_open_logs))], longest_s)
    _run(_afterwards, longest_s)


def _run(acts: list[Callable[[], None]], longest_s: float) -> None:
    # Daemons, because what does not answer must not keep the process.
    threads = [threading.Thread(target=act, daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(longest_s)


# Not atexit, whose turn comes when no thread pool takes work any more, and the clients look up names in one. Registered
# after the pools' own end (hence that import), it is called before it.
_at_the_end: Any = getattr(threading, "_register_atexit", atexit.register)
_at_the_end(flush_all)


def read_logs(folder: Path | UPath | str) -> Iterator[Line]:
    """Every line of every log in a folder, by name of the log and in the order of writing; none where it is missing.

    Raises:
        DataError: a file cannot be read.
    """
    files = [found for found in files_below(folder, deep=False) if found.name.endswith(ENDING)]
    for first in range(0, len(files), _READ_AT_ONCE):
        some = files[first : first + _READ_AT_ONCE]
        if is_local(some[0].where):
            for found in some:
                yield from _lines_of_file(found.where)
        else:
            for found, content in zip(some, _contents(some), strict=True):
                yield from _lines_of(found.where, content)


def read_line(line_file: UPath, offset: int, length: int) -> bytes:
    """One line again: `length` bytes at `offset`, as a `Line` stated them.

    Raises:
        DataError: it cannot be read, or the file has become shorter.
    """
    content = read_bytes(line_file, offset, offset + length)
    if len(content) != length:
        raise DataError(f"{line_file}: ends before the line that was read there earlier")
    return content


def _lines_of_file(file: UPath) -> Iterator[Line]:
    offset = 0
    with one_line_errors(file), file.open("rb") as stream:
        for line in stream:
            yield Line(file, offset, line.rstrip(b"\n"))
            offset += len(line)


def _contents(files: list[Found]) -> list[bytes]:
    """What several objects hold, asked for at once."""
    system = files[0].where.fs
    with one_line_errors(files[0].where.parent):
        nothing = [None] * len(files)
        contents = system.cat_ranges([found.where.path for found in files], nothing, nothing, on_error="raise")
    return [bytes(content) for content in contents]


def _lines_of(file: UPath, content: bytes) -> Iterator[Line]:
    offset = 0
    while offset < len(content):
        end = content.find(b"\n", offset)
        end = len(content) if end < 0 else end
        yield Line(file, offset, content[offset:end])
        offset = end + 1
