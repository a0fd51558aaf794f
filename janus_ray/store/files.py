"""Files that are whole or absent: text and JSON, written beside the target and renamed."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from janus_ray.errors import DataError
from janus_ray.text import one_line, well_formed


@contextmanager
def written_beside(path: Path | str) -> Generator[Path]:
    """A temporary file that takes the target's place once the block is through, and is gone if it fails.

    Raises:
        DataError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {os_reason(error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one, never half of one."""
    with written_beside(path) as temporary:
        temporary.write_text(well_formed(text), encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Writes indented JSON atomically: strict JSON, so a number that is not finite is written as null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def os_reason(error: OSError) -> str:
    """What the operating system says, in words; other libraries' errors of this kind may hold no code."""
    if error.errno:
        return os.strerror(error.errno)
    return error.strerror or next(iter(str(error).splitlines()), "") or type(error).__name__


def what_is_at(path: Path) -> Literal["file", "folder"] | None:
    """What a path leads to; None where there is nothing.

    Raises:
        DataError: the system does not let us look: no permission, a name too long, links in a circle.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{one_line(str(path))}: cannot be read: {os_reason(error)}") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else None


def read_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {next(iter(str(error).splitlines()), '')}") from None


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically, each as strict as `write_json` writes it."""
    write_text(path, "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
