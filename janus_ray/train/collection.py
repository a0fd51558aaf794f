"""The rows to train on, out of whatever holds them: a system message or none, a prompt, an answer.

A row that lacks something is left out and counted; a value that is no text is refused with its row.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from janus_ray.errors import DataError
from janus_ray.store.files import what_is_at
from janus_ray.store.hub import dataset_files
from janus_ray.store.tables import column_names, is_parquet, read_rows
from janus_ray.text import is_blank

_COLUMNS = ("system", "prompt", "output")
_STATUS = "status"
_COUNTS = ("rows", "rows_without_system", "rows_not_ok", "rows_without_prompt", "rows_without_output")
_CHUNK_ROWS = 8192
_SCHEMA = pa.schema([(name, pa.large_string()) for name in _COLUMNS])


@dataclass(frozen=True, slots=True)
class Collection:
    """What there is to train on."""

    rows: pa.Table
    """Columns system (null where there is none), prompt, output."""
    counts: dict[str, int]
    """"rows" in the table and "rows_without_system" among them; and those left out: "rows_not_ok" by their status,
    "rows_without_prompt", "rows_without_output"."""


def read_collection(source: str) -> Collection:
    """Reads a file, a folder of files or a published dataset with at least the columns system, prompt and output.

    Raises:
        DataError: it is missing or damaged, lacks a column, holds something other than text in one, or no usable row.
    """
    path = Path(os.path.expanduser(source))
    counts = dict.fromkeys(_COUNTS, 0)
    chunks: list[pa.Table] = []
    kept: list[dict[str, str | None]] = []
    for file in [path] if what_is_at(path) == "file" else dataset_files(source):
        for place, values in _rows_of(file):
            row = None if _is_not_ok(values, place) else _texts(values, place)
            reason = "rows_not_ok" if row is None else _what_is_missing(row)
            counts[reason or "rows"] += 1
            if row is not None and reason is None:
                counts["rows_without_system"] += row["system"] is None
                kept.append(row)
            if len(kept) == _CHUNK_ROWS:
                chunks.append(pa.Table.from_pylist(kept, schema=_SCHEMA))
                kept = []
    if not counts["rows"]:
        raise DataError(f"{source}: no row to train on: {left_out(counts) or 'it is empty'}")
    return Collection(pa.concat_tables([*chunks, pa.Table.from_pylist(kept, schema=_SCHEMA)]), counts)


def left_out(counts: dict[str, int]) -> str:
    """The rows left out, for a person: "2 whose status is not ok, 1 without output"; empty where there are none."""
    names = {
        "rows_not_ok": "whose status is not ok",
        "rows_without_prompt": "without prompt",
        "rows_without_output": "without output",
        "rows_too_long": "too long",
    }
    return ", ".join(f"{counts[key]} {name}" for key, name in names.items() if counts.get(key))


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with the place that messages name.

    Raises:
        DataError: a column is missing: in a table by its header, in JSON where no row has it.
    """
    if is_parquet(file):
        _check_columns(file, column_names(file))
    present: Counter[str] = Counter()
    for row in read_rows(str(file), columns=(*_COLUMNS, _STATUS)):
        present.update(row.values.keys())
        yield f"{file}, {row.place}", row.values
    if present:
        _check_columns(file, list(present))


def _check_columns(file: Path, present: list[str]) -> None:
    if missing := [name for name in _COLUMNS if name not in present]:
        shown = ", ".join(present[:20])
        raise DataError(f"{file}: no column {missing[0]!r}; it has: {shown}{', ...' if len(present) > 20 else ''}")


def _is_not_ok(values: dict[str, Any], place: str) -> bool:
    """Whether a row failed where it was made. Collections of others have no such column; a null in ours is not "ok"."""
    return _STATUS in values and _text(values, _STATUS, place) != "ok"


def _texts(values: dict[str, Any], place: str) -> dict[str, str | None]:
    """The columns of a row; None for what is absent, null or blank."""
    texts = {name: _text(values, name, place) for name in _COLUMNS}
    return {name: None if text is None or is_blank(text) else text for name, text in texts.items()}


def _text(values: dict[str, Any], name: str, place: str) -> str | None:
    value = values.get(name)
    # NaN is how pandas writes a missing text.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is {_kind(value)}, expected text")
    return value


def _what_is_missing(row: dict[str, str | None]) -> str | None:
    return next((f"rows_without_{name}" for name in ("prompt", "output") if row[name] is None), None)


def _kind(value: Any) -> str:
    for kind, name in (
        (bool, "true or false"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    ):
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"
