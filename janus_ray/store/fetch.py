"""Folders of an object storage on this machine, and back: models are loaded from files that have a path."""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import shutil
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from upath import UPath

from janus_ray.env import cache_folder
from janus_ray.errors import DataError
from janus_ray.store.files import Found, files_below, os_reason
from janus_ray.store.location import is_local, location, object_revision, one_line_errors

_AT_ONCE = 4


def fetched_folder(where: UPath, patterns: Sequence[str]) -> Path:
    """A folder of an object storage as one on this machine, fetched once for each content of it.

    It lies in the cache (JANUS_CACHE_DIR) under a name made of the names and checksums of its files, so that a folder
    that has changed is fetched again and one that has not is not, by whichever process of the machine comes first.

    Args:
        where: the folder; only files directly in it are fetched.
        patterns: the files to fetch, as `fnmatch` takes them.

    Raises:
        DataError: it cannot be read, or there is no room.
    """
    files = [found for found in files_below(where, deep=False) if any(fnmatch.fnmatch(found.name, p) for p in patterns)]
    if not files:
        raise DataError(f"{where}: holds no file of a model")
    digest = hashlib.sha256(str(where.protocol).encode())
    for found in files:
        digest.update(f"{found.name}\0{object_revision(found.where, found.info)}\n".encode())
    target = cache_folder() / "folders" / digest.hexdigest()[:32]
    try:
        with _alone(target):
            if not target.is_dir():
                _fetch(where, files, target)
    except OSError as error:
        raise DataError(f"{target}: {where} cannot be fetched into the cache: {os_reason(error)}") from None
    return target


def _fetch(where: UPath, files: Sequence[Found], target: Path) -> None:
    size_gib = sum(found.size_bytes for found in files) / 1024**3
    print(f"fetching {where} ({len(files)} files, {size_gib:.2f} GiB) into {target}", flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
        with one_line_errors(where), ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda each: each.where.fs.get_file(each.where.path, str(Path(partial, each.name))), files))
        for found in files:
            size = Path(partial, found.name).stat().st_size
            if size != found.size_bytes:
                raise DataError(f"{found.where}: changed while it was fetched ({size} bytes, not {found.size_bytes})")
        Path(partial).rename(target)
        # What the context removes.
        Path(partial).mkdir()


@contextmanager
def _alone(target: Path) -> Generator[None]:
    """One process of this machine at a time; the others find what it has fetched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as stream:
        # Where the cache's file system has no locks, two may fetch the same, and the later rename finds it there.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def upload_folder(folder: Path, to: UPath | Path | str, last: Sequence[str] = ()) -> None:
    """Copies the files of a local folder to a location, those that make it count at the very end.

    Args:
        folder: where they lie; subfolders are copied as well.
        to: the folder they come to lie in.
        last: names of files that are written after all others, in this order, e.g. an index or a manifest.

    Raises:
        DataError: it cannot be written; what is there then lacks the files named last.
    """
    target = location(to)
    found = {each.name: each for each in files_below(folder)}
    names = [name for name in found if name not in last] + [name for name in last if name in found]
    for name in names:
        source = Path(folder, name)
        if is_local(target):
            with one_line_errors(target / name, "cannot be written"):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                partial = (target / name).with_name(f".{source.name}.tmp")
                shutil.copyfile(source, partial)
                partial.replace(target / name)
        else:
            with one_line_errors(target / name, "cannot be written"):
                target.fs.put_file(str(source), (target / name).path)
