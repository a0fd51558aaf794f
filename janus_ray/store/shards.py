"""Documents as flat token shards: tokenised once, then read by index, from wherever they lie.

A folder of them holds

    shard-00000.tokens   the token ids of some documents end to end, then one byte per token: 1 where it carries loss
    index.npz            for each document its length, its supervised tokens, and the row that it comes from
    shards.json          the shards with size and hash, written last: without it there are no documents

Ids have the smallest unsigned type that the vocabulary fits into. A shard is written whole by one process and never
changed, so several processes may write several at once.
"""

from __future__ import annotations

import bisect
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import xxhash
from upath import UPath

from janus_ray.env import cache_folder
from janus_ray.errors import ConfigError, DataError
from janus_ray.store.files import files_below, read_bytes, read_json, what_is_at, write_bytes, write_json
from janus_ray.store.location import is_local, location

_RECORD, _INDEX = "shards.json", "index.npz"
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the record says of one shard."""

    name: str
    documents: int
    tokens: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of each document without reading it; arrays of [documents]."""

    lengths: np.ndarray
    """Tokens."""
    supervised: np.ndarray
    """Tokens that carry loss."""
    rows: np.ndarray
    """The row of the collection that it was made from; rows ascend."""


def id_type(vocabulary: int) -> np.dtype:
    """The smallest unsigned type that holds every token id below `vocabulary`."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32).newbyteorder("<")


def write_shard(folder: Path | UPath, number: int, ids: np.ndarray, mask: np.ndarray, documents: int) -> ShardEntry:
    """Writes one shard, whole or not at all.

    Args:
        folder: where the documents lie.
        number: of the shard, from 0.
        ids: [tokens] all documents end to end, in the type of `id_type`.
        mask: [tokens] whether a token carries loss.
        documents: how many they are.

    Raises:
        DataError: it cannot be written.
    """
    assert ids.shape == mask.shape
    content = ids.tobytes() + mask.astype(np.uint8).tobytes()
    entry = ShardEntry(f"shard-{number:05d}.tokens", documents, len(ids), xxhash.xxh3_128_hexdigest(content))
    write_bytes(location(folder) / entry.name, content)
    return entry


def finish_shards(folder: Path | UPath, entries: Sequence[ShardEntry], dtype: np.dtype, index: Index) -> None:
    """Writes the index and, last, the record that makes the folder count."""
    assert sum(entry.documents for entry in entries) == len(index.lengths)
    folder, archive = location(folder), BytesIO()
    np.savez(archive, lengths=index.lengths, supervised=index.supervised, rows=index.rows)
    write_bytes(folder / _INDEX, archive.getvalue())
    record = {"dtype": dtype.str, "index_xxh3": _index_hash(index), "shards": [asdict(entry) for entry in entries]}
    write_json(folder / _RECORD, record)


def damage(folder: Path | UPath) -> str | None:
    """Why the documents in a folder cannot be used, after a look at every byte; None where they can.

    Shards on an object storage are compared by size only: their bytes are looked at when they are fetched.
    """
    folder = location(folder)
    try:
        shards = TokenShards(folder)
        found = {file.name: file for file in files_below(folder, deep=False)}
        for entry in shards.entries:
            if entry.name not in found:
                return f"{entry.name} is missing"
            if found[entry.name].size_bytes != shards.size_bytes(entry):
                return f"{entry.name} has {found[entry.name].size_bytes:,} bytes, not {shards.size_bytes(entry):,}"
            if is_local(folder) and _hash(folder / entry.name) != entry.xxh3:
                return f"{entry.name} is damaged (its content has another hash)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ConfigError, DataError) as error:
        return str(error)
    return None


class TokenShards:
    """The documents of a folder: `shards[i] -> (ids, mask)`, views of memory-mapped files."""

    def __init__(self, folder: Path | UPath) -> None:
        """Reads record and index; a shard is opened when a document in it is first asked for.

        Raises:
            ConfigError: this machine does not see the folder.
            DataError: the record or the index is damaged.
        """
        self.folder = folder = location(folder)
        if what_is_at(folder / _RECORD) != "file":
            raise ConfigError(
                f"{folder / _RECORD}: no such file on {socket.gethostname()}; output_dir must be storage that every "
                "node sees"
            )
        record = read_json(folder / _RECORD)
        try:
            self.dtype = np.dtype(record["dtype"])
            self.entries = [ShardEntry(**entry) for entry in record["shards"]]
            with np.load(BytesIO(read_bytes(folder / _INDEX))) as arrays:
                self.index = Index(**{name: arrays[name] for name in ("lengths", "supervised", "rows")})
            whole = _index_hash(self.index) == record["index_xxh3"]
        # A file that is no archive, or one of something else.
        except (
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            OSError,
            NotImplementedError,
            BadZipFile,
            DataError,
        ) as error:
            raise DataError(f"{folder}: {_RECORD} or {_INDEX} is damaged: {error or type(error).__name__}") from None
        if not whole or sum(entry.documents for entry in self.entries) != len(self.index.lengths):
            raise DataError(f"{folder}: {_INDEX} does not fit {_RECORD}")
        self._starts = [0, *np.cumsum([entry.documents for entry in self.entries]).tolist()]
        self._offsets = np.concatenate([[0], np.cumsum(self.index.lengths, dtype=np.int64)])
        self._opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.index.lengths)

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of a document, and for each whether it carries loss."""
        shard = bisect.bisect_right(self._starts, document) - 1
        ids, mask = self._open(shard)
        start, end = self._offsets[document : document + 2] - self._offsets[self._starts[shard]]
        return ids[start:end], mask[start:end]

    def size_bytes(self, entry: ShardEntry) -> int:
        """What the file of a shard has."""
        return entry.tokens * (self.dtype.itemsize + 1)

    @cached_property
    def xxh3(self) -> str:
        """Hash of every token, every mask and every length."""
        digest = xxhash.xxh3_128(f"{self.dtype.str} {_index_hash(self.index)}".encode())
        for entry in self.entries:
            digest.update(entry.xxh3.encode())
        return digest.hexdigest()

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._opened:
            entry = self.entries[shard]
            path = self.folder / entry.name
            path = path if is_local(path) else _fetched(path, entry)
            split = entry.tokens * self.dtype.itemsize
            # A file of no bytes cannot be mapped.
            size = self.size_bytes(entry)
            content = np.memmap(path, np.uint8, mode="r", shape=(size,)) if size else np.zeros(0, np.uint8)
            self._opened[shard] = content[:split].view(self.dtype), content[split:].view(np.bool_)
        return self._opened[shard]


def joined(indices: Iterable[Index]) -> Index:
    """The index of several shards' documents, in order."""
    parts = list(indices)
    return Index(*(np.concatenate([getattr(part, name) for part in parts]) for name in Index.__slots__))


def _fetched(shard: UPath, entry: ShardEntry) -> Path:
    """A shard in this machine's cache, under its hash: every process of the machine reads the same file.

    Raises:
        DataError: it cannot be fetched, or is not what the record says.
    """
    local = cache_folder() / "shards" / entry.xxh3
    if not local.is_file():
        content = read_bytes(shard)
        if xxhash.xxh3_128_hexdigest(content) != entry.xxh3:
            raise DataError(
                f"{shard}: is damaged (its content has another hash); where it is deleted, --if-exists resume makes it "
                "again"
            )
        write_bytes(local, content)
    return local


def _index_hash(index: Index) -> str:
    digest = xxhash.xxh3_128()
    for name in Index.__slots__:
        digest.update(np.ascontiguousarray(getattr(index, name), dtype="<i8").tobytes())
    return digest.hexdigest()


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
