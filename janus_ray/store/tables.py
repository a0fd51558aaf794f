"""Tables: JSON lines and Parquet, whatever shape they have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from janus_ray.errors import DataError
from janus_ray.store.files import written_beside


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Reads one JSON object per line; empty lines are skipped.

    Raises:
        DataError: the file is missing, or a line is not a JSON object (its number is named).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    rows = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            rows.append(row)
    return rows


def write_parquet(path: Path | str, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Writes one Parquet file atomically."""
    with written_beside(path) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group_rows)


def parquet_files(path: Path | str) -> list[Path]:
    """The Parquet files at a path: the file itself, or those in the folder, in name order.

    Raises:
        DataError: there are none.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*.parquet") if not p.name.startswith("."))
    if not files:
        raise DataError(f"{path}: {'holds no .parquet file' if path.is_dir() else 'no such file or folder'}")
    return files


def read_parquet(path: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file or a folder of them.

    Raises:
        DataError: nothing is there, a file is not Parquet, or a column is missing (those present are named).
    """
    tables = []
    for file in parquet_files(path):
        try:
            present = pq.read_schema(file).names
            missing = [name for name in columns or () if name not in present]
            if missing:
                raise DataError(f"{file}: no column {missing[0]!r}; it has: {', '.join(present)}")
            tables.append(pq.read_table(file, columns=list(columns) if columns else None))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from None
    return pa.concat_tables(tables, promote_options="default")
