"""The files that go to the cluster with a job: the working directory without what nobody needs there."""

from __future__ import annotations

import fnmatch
import io
import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from janus_ray.errors import ConfigError
from janus_ray.text import one_line

_MIB = 1024**2
_IGNORE_FILE = ".rayignore"
# What no checkout needs to say.
_NEVER = (".git", ".venv", "venv", "__pycache__")
_NAMED_FOLDERS = 3
# A time that every zip file can hold, so that equal files give an equal package, which is sent once.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def files_to_send(folder: Path) -> list[str]:
    """Names of the files that go along, relative to the folder and in order.

    Left out is what git ignores and what `.rayignore` names, as `ray job submit` leaves it out.

    Raises:
        ConfigError: the folder cannot be read, or `.rayignore` says something else than names to leave out.
    """
    patterns = [*_NEVER, *_patterns(folder / _IGNORE_FILE)]
    names = _git_files(folder)
    if names is None:
        patterns += _patterns(folder / ".gitignore", strict=False)
        names = _walked(folder, patterns)
    return sorted(name for name in names if not _is_left_out(name, patterns) and (folder / name).is_file())


def packed(folder: Path, names: list[str], more: Mapping[str, bytes], limit_mib: float) -> bytes:
    """A zip file of the named files and of some more.

    Args:
        folder: what the names are relative to.
        names: from `files_to_send`.
        more: further files, by their names in the package.
        limit_mib: most that the files may have together, before they are compressed.

    Raises:
        ConfigError: they have more, or one cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    if sum(sizes.values()) > limit_mib * _MIB:
        raise ConfigError(
            f"{folder}: has {sum(sizes.values()) / _MIB:.0f} MiB to send to the cluster, at most {limit_mib:g} are "
            f"sent; most of it: {_biggest(sizes)}; name in .rayignore or .gitignore what the job does not need there, "
            "or raise --upload-limit-mib"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        for name in names:
            try:
                _add(package, name, (folder / name).read_bytes(), (folder / name).stat().st_mode)
            except OSError as error:
                raise ConfigError(f"{one_line(str(folder / name))}: {error.strerror}") from None
        for name, content in more.items():
            _add(package, name, content, 0o644)
    return buffer.getvalue()


def _add(package: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o755 if mode & 0o100 else 0o644) << 16
    package.writestr(entry, content)


def _biggest(sizes: Mapping[str, int]) -> str:
    """The folders that hold most, each by the name that would leave it out."""
    totals: Counter[str] = Counter()
    for name, size in sizes.items():
        parts = name.split("/")
        totals["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += size
    return ", ".join(f"{one_line(name)} ({size / _MIB:.0f} MiB)" for name, size in totals.most_common(_NAMED_FOLDERS))


def _git_files(folder: Path) -> Iterable[str] | None:
    """What git tracks, and what is new and not ignored; None where the folder is no checkout or there is no git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    return [os.fsdecode(name) for name in set(listed.stdout.split(b"\0")) if name] if listed.returncode == 0 else None


def _walked(folder: Path, patterns: list[str]) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise ConfigError(f"{one_line(str(error.filename))}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        inside = os.path.relpath(parent, folder)
        prefix = "" if inside == "." else f"{inside}/"
        folders[:] = [name for name in folders if not _is_left_out(f"{prefix}{name}", patterns)]
        yield from (f"{prefix}{name}" for name in files)


def _patterns(file: Path, *, strict: bool = True) -> list[str]:
    """The names in an ignore file; only whole names and paths with * are understood.

    Raises:
        ConfigError: it takes something back ("!name"), which would be sent by Ray and not by us.
    """
    if not file.is_file():
        return []
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line.rstrip("/") for line in lines if line.rstrip("/") and not line.startswith("#")]
    if strict and any(line.startswith("!") for line in found):
        raise ConfigError(f"{file}: lines that start with ! are not understood; name what is left out only")
    return [line for line in found if not line.startswith("!")]


def _is_left_out(name: str, patterns: list[str]) -> bool:
    """Whether a path, a folder above it, or a name on the way is one of the patterns."""
    parts = name.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for pattern in patterns:
        candidates = above if "/" in pattern else parts
        if any(fnmatch.fnmatchcase(one, pattern.lstrip("/")) for one in candidates):
            return True
    return False
