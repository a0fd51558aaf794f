"""Files that are whole or absent: text and JSON, written beside the target and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from janus_ray.errors import DataError


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
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one, never half of one."""
    with written_beside(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path | str, value: object) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
