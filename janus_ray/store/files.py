"""Files that are whole or absent, on any location: text and JSON, written beside the target or in one request."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.location import (
    error_code,
    in_time,
    is_local,
    is_no_bucket,
    location,
    one_line_errors,
    os_reason,
    storage_errors,
)
from janus_ray.text import one_line, well_formed

# An object that is written in one request, retries included; a large one at this pace.
_LONGEST_S, _SLOWEST_BYTES_PER_S = 180.0, 1024**2
# Asked for at once of a file that is read from an object storage.
_BLOCK_BYTES = 4 * 1024**2
# Deleted with one request of these many where the storage has such a request; S3's own limit.
_DELETED_AT_ONCE = 1000
# fsspec expands these in what it is told to delete.
_GLOB = "*?["


@contextmanager
def written_beside(path: Path | UPath | str) -> Generator[Path]:
    """A temporary file that takes the target's place once the block is through, and is gone if it fails.

    On a file system it lies beside the target and is renamed; for an object storage it lies in the temporary folder of
    this machine and becomes one object in one step.

    Raises:
        DataError: the file cannot be written.
    """
    target = location(path)
    if not is_local(target):
        with _uploaded(target) as temporary:
            yield temporary
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {os_reason(error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _uploaded(target: UPath) -> Generator[Path]:
    with one_line_errors(target, "cannot be written"), tempfile.TemporaryDirectory(prefix="janus_ray-") as folder:
        temporary = Path(folder, "object")
        yield temporary
        longest_s = _LONGEST_S + temporary.stat().st_size / _SLOWEST_BYTES_PER_S
        in_time(target, "put_file", str(temporary), target.path, longest_s=longest_s)


def write_text(path: Path | UPath | str, text: str) -> None:
    """Writes a text so that a reader sees the old file or the new one, never half of one."""
    target = location(path)
    if not is_local(target):
        write_bytes(target, well_formed(text).encode())
        return
    with written_beside(target) as temporary:
        temporary.write_text(well_formed(text), encoding="utf-8")


def write_bytes(path: Path | UPath | str, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one; on an object storage with one request.

    Raises:
        DataError: it cannot be written.
    """
    target = location(path)
    if is_local(target):
        with written_beside(target) as temporary:
            temporary.write_bytes(content)
        return
    with one_line_errors(target, "cannot be written"):
        in_time(target, "pipe_file", target.path, content, longest_s=_LONGEST_S)


def create(path: Path | UPath | str, content: bytes) -> bool:
    """Writes a file only where there is none: of several that try at once, exactly one succeeds.

    Returns:
        Whether it was this call that made the file.

    Raises:
        DataError: it cannot be written.
    """
    target = location(path)
    with one_line_errors(target, "cannot be written"):
        try:
            if is_local(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as stream:
                    stream.write(content)
            else:
                in_time(target, "pipe_file", target.path, content, mode="create", longest_s=_LONGEST_S)
        except FileExistsError:
            return False
        except OSError as error:
            # What S3 answers while another such request is under way.
            if error_code(error) == "ConditionalRequestConflict":
                return False
            raise
    return True


def write_json(path: Path | UPath | str, value: object) -> None:
    """Writes indented JSON atomically: strict JSON, so a number that is not finite is written as null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_jsonl(path: Path | UPath | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically, each as strict as `write_json` writes it."""
    with written_beside(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        for row in rows:
            stream.write(well_formed(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)) + "\n")


def what_is_at(path: Path | UPath | str) -> Literal["file", "folder"] | None:
    """What a path leads to; None where there is nothing. An object storage has a folder where it has an object below.

    Raises:
        DataError: we may not look: no permission, no credentials, no such bucket, a name too long, links in a circle.
    """
    where = location(path)
    try:
        if not is_local(where):
            return "folder" if where.fs.info(where.path)["type"] == "directory" else "file"
        mode = where.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_no_bucket(error):
            raise DataError(f"{where}: {os_reason(error, where)}") from None
        return None
    except storage_errors() as error:
        raise DataError(f"{one_line(str(where))}: cannot be read: {os_reason(error, where)}") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else None


def read_bytes(path: Path | UPath | str, start: int | None = None, end: int | None = None) -> bytes:
    """What a file holds, or its bytes from start up to end.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    where = location(path)
    try:
        if not is_local(where):
            return where.fs.cat_file(where.path, start=start, end=end)
        with where.open("rb") as stream:
            stream.seek(start or 0)
            return stream.read() if end is None else stream.read(max(0, end - (start or 0)))
    except FileNotFoundError as error:
        reason = os_reason(error, where) if is_no_bucket(error) else "no such file"
        raise DataError(f"{where}: {reason}") from None
    except storage_errors() as error:
        # Nothing is there: the file is empty, or ends before.
        if not is_local(where) and error_code(error) in ("InvalidRange", "416"):
            return b""
        raise DataError(f"{one_line(str(where))}: cannot be read: {os_reason(error, where)}") from None


def opened(path: Path | UPath) -> IO[bytes]:
    """The file for reading from its beginning or anywhere in it; errors are the storage's own (`storage_errors`)."""
    where = location(path)
    if is_local(where):
        return where.open("rb")
    return where.fs.open(where.path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


def read_json(path: Path | UPath | str) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {next(iter(str(error).splitlines()), '')}") from None


class Found(NamedTuple):
    """A file below a folder."""

    name: str
    """Its path relative to the folder, with slashes."""
    where: UPath
    size_bytes: int
    info: Mapping[str, Any]
    """What else the object storage's listing says of it; empty on a file system."""


def files_below(folder: Path | UPath | str, *, deep: bool = True) -> list[Found]:
    """The files below a folder, or directly in it, by name; none where there is no such folder.

    Raises:
        DataError: we may not look.
    """
    where = location(folder)
    if is_local(where):
        with one_line_errors(where):
            return sorted(_local_files(where, deep), key=lambda found: found.name)
    with one_line_errors(where):
        return sorted(_objects(where, deep), key=lambda found: found.name)


def _local_files(folder: Path, deep: bool) -> Iterator[Found]:
    for path in folder.rglob("*") if deep else folder.iterdir() if folder.is_dir() else ():
        # What another process is writing or deleting there may be gone by now.
        with suppress(FileNotFoundError):
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                yield Found(path.relative_to(folder).as_posix(), UPath(path), state.st_size, {})


def _objects(folder: UPath, deep: bool) -> Iterator[Found]:
    try:
        listed = folder.fs.find(folder.path, maxdepth=None if deep else 1, detail=True)
    except FileNotFoundError as error:
        if is_no_bucket(error):
            raise
        return
    prefix = folder.path.rstrip("/") + "/"
    for path, info in listed.items():
        name = path.removeprefix(prefix)
        # Consoles make an empty object of a folder's own name, and a file of that name is no file below it.
        if path.startswith(prefix) and name and not name.endswith("/"):
            yield Found(name, folder / name, int(info.get("size") or 0), info)


def delete_files(files: Iterable[Found]) -> None:
    """Deletes files, many with one request where the storage can.

    Raises:
        DataError: one cannot be deleted; those before it are gone.
    """
    files = list(files)
    for first in range(0, len(files), _DELETED_AT_ONCE):
        some = files[first : first + _DELETED_AT_ONCE]
        with one_line_errors(some[0].where.parent, "cannot be deleted"):
            plain = [found for found in some if not any(mark in found.where.path for mark in _GLOB)]
            if plain and not is_local(plain[0].where):
                plain[0].where.fs.rm([found.where.path for found in plain])
            for found in some:
                if is_local(found.where):
                    found.where.unlink(missing_ok=True)
                elif found not in plain:
                    found.where.fs.rm_file(found.where.path)


def arrow_filesystem(where: Path | UPath | str) -> tuple[Any, str]:
    """The pyarrow filesystem of a location and the path in it, as Ray and pyarrow take them.

    Raises:
        DataError: as `location`.
    """
    from pyarrow import fs

    found = location(where)
    if is_local(found):
        return fs.LocalFileSystem(), str(found.absolute())
    return fs.PyFileSystem(fs.FSSpecHandler(found.fs)), found.path
