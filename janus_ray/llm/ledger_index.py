"""Where each finished request of a ledger lies: 16 bytes of its key, a file, an offset; the texts stay on disk.

The index is kept in a file beside the ledger's own. It says up to where it has read each of them, so whoever opens the
ledger reads only what came later, and the processes of a machine share its pages. Nothing is believed because it stands
there: an index that does not fit the files is made anew, and a record is checked against its key when it is read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import xxhash
from upath import UPath

from janus_ray.errors import DataError
from janus_ray.llm.ledger_line import parsed_line
from janus_ray.llm.request import FINAL_KINDS
from janus_ray.store.files import Found, files_below, read_bytes, what_is_at, write_bytes
from janus_ray.store.location import is_local, one_line_errors
from janus_ray.store.log import ENDING

INDEX = "index.arrow"
_VERSION = 1
_COLUMNS = {"high": "u8", "low": "u8", "file": "u4", "offset": "u8", "length": "u4", "ok": "u1"}
# What an object storage's listing says that changes with the content: S3, Google, Azure.
_TAGS = ("ETag", "etag", "generation", "md5Hash")


class Place(NamedTuple):
    """Where a line lies."""

    file: str
    """Its name in the ledger's folder."""
    offset: int
    length: int
    ok: bool
    """Whether it is a success; otherwise it is an error that the same request is sure to meet again."""


class _Read(msgspec.Struct, array_like=True):
    """What an index knows of one file of the ledger."""

    name: str
    size: int = 0
    tag: str = ""
    end: int = 0
    """Bytes up to the end of the last whole line that was read."""
    skipped: int = 0
    """Lines up to there that are no records."""


class _About(msgspec.Struct):
    version: int
    checksum: str
    files: list[_Read]


@dataclass(slots=True)
class _Lines:
    """Lines that were read, one entry each in columns; equal keys are not yet settled."""

    digests: bytearray = field(default_factory=bytearray)
    file: array = field(default_factory=lambda: array("I"))
    offset: array = field(default_factory=lambda: array("Q"))
    length: array = field(default_factory=lambda: array("I"))
    ok: array = field(default_factory=lambda: array("B"))

    def columns(self) -> dict[str, np.ndarray]:
        halves = np.frombuffer(bytes(self.digests), dtype=">u8").reshape(-1, 2).astype("u8")
        rest = {name: np.frombuffer(getattr(self, name), dtype=_COLUMNS[name]) for name in list(_COLUMNS)[2:]}
        return {"high": halves[:, 0], "low": halves[:, 1], **rest}


def digest_of(key: str) -> bytes:
    """The 16 bytes under which a key is found; the line itself tells keys apart that meet there."""
    return xxhash.xxh3_128_digest(key.encode())


class LedgerIndex:
    """The finished requests of a ledger's folder at one time."""

    def __init__(self, folder: UPath) -> None:
        """Reads the index file and whatever the ledger's files hold beyond it.

        Raises:
            DataError: a file of the folder cannot be read.
        """
        self._folder = folder
        files = [found for found in files_below(folder, deep=False) if found.name.endswith(ENDING)]
        _refuse_folders(folder)
        about, columns = _kept(folder, files)
        known = {read.name: read for read in about.files} if about else {}
        self._read = known | {found.name: _Read(found.name) for found in files if found.name not in known}
        self._names = list(self._read)
        numbers = {name: number for number, name in enumerate(self._names)}
        lines, torn = _Lines(), 0
        self.new_lines = 0
        """Lines that the index file did not know."""
        for found in files:
            torn += self._read_on(found, numbers[found.name], lines)
        self._columns = _settled(columns, lines.columns()) if lines.ok else columns
        self.skipped = torn + sum(read.skipped for read in self._read.values())
        """Lines that are no records."""

    def __len__(self) -> int:
        """Number of finished requests, errors that count as such included."""
        return len(self._columns["high"])

    @property
    def num_ok(self) -> int:
        """Number of requests that succeeded."""
        return int(np.count_nonzero(self._columns["ok"]))

    def find(self, digest: bytes) -> Place | None:
        """Where the record of a key lies."""
        high = self._columns["high"]
        wanted, low = (np.uint64(int.from_bytes(half, "big")) for half in (digest[:8], digest[8:]))
        at = int(np.searchsorted(high, wanted))
        while at < len(high) and high[at] == wanted:
            if self._columns["low"][at] == low:
                file, offset, length, ok = (int(self._columns[name][at]) for name in ("file", "offset", "length", "ok"))
                return Place(self._names[file], offset, length, bool(ok))
            at += 1
        return None

    def write(self) -> None:
        """Keeps the index beside the ledger.

        Raises:
            DataError: it cannot be written.
        """
        about = _About(_VERSION, _checksum(self._columns), [self._read[name] for name in self._names])
        table = pa.table(self._columns).replace_schema_metadata({"ledger": msgspec.json.encode(about)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_bytes(self._folder / INDEX, sink.getvalue().to_pybytes())

    def _read_on(self, found: Found, number: int, lines: _Lines) -> int:
        """Reads a file from where the index ends; returns the lines skipped at its torn end, which are not kept."""
        read = self._read[found.name]
        read.size, read.tag = found.size_bytes, _tag(found)
        if read.size == read.end:
            return 0
        for offset, line in _lines_from(found, read.end):
            record = parsed_line(line)
            if record is not None and (record.status == "ok" or record.error_kind in FINAL_KINDS):
                lines.digests += digest_of(record.key)
                lines.file.append(number)
                lines.offset.append(offset)
                lines.length.append(len(line))
                lines.ok.append(record.status == "ok")
            self.new_lines += 1
            if not line.endswith(b"\n"):
                return record is None
            read.end = offset + len(line)
            read.skipped += record is None
        return 0


def _lines_from(found: Found, start: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and their offsets, from an offset on."""
    if is_local(found.where):
        with one_line_errors(found.where), found.where.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                yield start, line
                start += len(line)
        return
    content = read_bytes(found.where, start, found.size_bytes)
    at = 0
    while at < len(content):
        end = content.find(b"\n", at) + 1 or len(content)
        yield start + at, content[at:end]
        at = end


def _refuse_folders(folder: UPath) -> None:
    """A folder with the name of a ledger's file would hide what was meant to be read.

    Raises:
        DataError: there is one.
    """
    if is_local(folder) and folder.is_dir():
        for path in folder.glob(f"*{ENDING}"):
            if path.is_dir():
                raise DataError(f"{path}: the ledger cannot be read: is a folder")


def _tag(found: Found) -> str:
    """What changes with a file's content."""
    if is_local(found.where):
        return str(found.where.stat().st_mtime_ns)
    return next((str(found.info[name]) for name in _TAGS if found.info.get(name)), "")


def _kept(folder: UPath, files: list[Found]) -> tuple[_About | None, dict[str, np.ndarray]]:
    """The index file's content, where there is one and it fits the files; otherwise an empty index."""
    nothing = None, {name: np.zeros(0, kind) for name, kind in _COLUMNS.items()}
    path = folder / INDEX
    if not files or what_is_at(path) != "file":
        return nothing
    try:
        source = pa.memory_map(str(path)) if is_local(path) else pa.BufferReader(read_bytes(path))
        table = pa.ipc.open_file(source).read_all()
        about = msgspec.json.decode((table.schema.metadata or {})[b"ledger"], type=_About)
        columns = {name: table[name].combine_chunks().to_numpy(zero_copy_only=True) for name in _COLUMNS}
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError, msgspec.MsgspecError):
        return nothing
    fits = (
        about.version == _VERSION
        and all(columns[name].dtype == np.dtype(kind) for name, kind in _COLUMNS.items())
        and about.checksum == _checksum(columns)
        and _only_grown(about.files, files)
    )
    return (about, columns) if fits else nothing


def _only_grown(known: list[_Read], files: list[Found]) -> bool:
    """Whether the files that an index was made from are still there, unchanged or longer."""
    now = {found.name: found for found in files}
    return all(
        (found := now.get(read.name)) is not None
        and (found.size_bytes > read.size or (found.size_bytes == read.size and _tag(found) == read.tag))
        for read in known
    )


def _settled(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One entry for each key, sorted by it: the last success, or where there is none the first error."""
    columns = {name: np.concatenate([old[name], new[name]]) for name in _COLUMNS}
    # By key; in one key the errors before the successes, each in the order of writing.
    order = np.lexsort((columns["ok"], columns["low"], columns["high"]))
    columns = {name: values[order] for name, values in columns.items()}
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (columns["high"][1:] != columns["high"][:-1]) | (columns["low"][1:] != columns["low"][:-1])
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(order)) - 1
    chosen = np.where(columns["ok"][last] == 1, last, first)
    return {name: values[chosen] for name, values in columns.items()}


def _checksum(columns: dict[str, np.ndarray]) -> str:
    state = xxhash.xxh3_128()
    for name in _COLUMNS:
        state.update(np.ascontiguousarray(columns[name]).data)
    return state.hexdigest()
