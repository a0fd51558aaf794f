"""Tables: rows of whatever file, folder or published dataset there is, and our own JSON lines and Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.files import files_below, opened, read_bytes, what_is_at, written_beside
from janus_ray.store.hub import dataset_files, hub_id
from janus_ray.store.location import location, storage_errors
from janus_ray.store.text_rows import LFS_POINTER, json_lines, text_rows
from janus_ray.text import well_formed_values

_BATCH_ROWS = 1024
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table and where it stands: "line 12" as an editor counts, or "part-0001.parquet, row 3" from 1."""

    place: str
    values: dict[str, Any]


def read_rows(source: str, *, split: str = "train", columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Reads rows one after another, whatever holds them.

    A file's content says what it is: Parquet, JSON lines or a JSON array; .csv and .tsv are tables with a header. Texts
    are well-formed; other values are as the file has them.

    Args:
        source: a file, a folder of such files, or the id of a published dataset ("org/name", "org/name@revision").
        split: which part of a published dataset, or of a folder whose files are named by split.
        columns: the only ones to read of a Parquet file, where it has them; None reads all.

    Raises:
        DataError: one line with the source, the place, and what is wrong.
    """
    is_file = hub_id(source) is None and what_is_at(source) == "file"
    files = (
        [(file, f"{file.name}, ") for file in dataset_files(source, split)] if not is_file else [(location(source), "")]
    )
    for file, prefix in files:
        if is_parquet(file):
            for number, values in _parquet_rows(file, columns):
                yield Row(f"{prefix}row {number}", values)
        else:
            for number, values in text_rows(file):
                yield Row(f"{prefix}line {number}", values)


def read_jsonl(path: Path | UPath | str) -> list[dict[str, Any]]:
    """Reads one JSON object per line, as `write_jsonl` writes them; empty lines are skipped.

    Raises:
        DataError: the file is missing, or a line is not a JSON object (its number is named).
    """
    where = location(path)
    if (there := what_is_at(where)) != "file":
        raise DataError(f"{path}: {'is a folder, expected a file' if there else 'no such file'}")
    return [values for _, values in json_lines(where)]


def is_parquet(path: Path | UPath) -> bool:
    """Whether a file is Parquet, by its content; by its name where it is empty.

    Raises:
        DataError: it cannot be read.
    """
    head = read_bytes(path, 0, len(_MAGIC))
    return head == _MAGIC or (not head and path.suffix == ".parquet")


def column_names(path: Path | UPath) -> list[str]:
    """The columns of a Parquet file.

    Raises:
        DataError: the file is not whole.
    """
    try:
        with opened(path) as stream:
            return pq.read_schema(stream).names
    except (pa.ArrowException, *storage_errors()) as error:
        raise _not_parquet(path, error) from None


def _parquet_rows(path: Path | UPath, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file, numbered from 1.

    Raises:
        DataError: the file is not whole, or a value cannot be read.
    """
    number = 0
    try:
        with opened(path) as stream, pq.ParquetFile(stream) as file:
            _check_columns(file.schema_arrow.names, path)
            chosen = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
                for values in _listed(batch, path, number):
                    number += 1
                    yield number, well_formed_values(values)
    except (pa.ArrowException, *storage_errors()) as error:
        raise _not_parquet(path, error) from None


def _listed(batch: pa.RecordBatch, path: Path | UPath, before: int) -> list[dict[str, Any]]:
    """The batch as Python values.

    Raises:
        DataError: a text is not UTF-8, or a date or number has no Python value; with its row.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            reason = "a text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
            raise DataError(f"{path}, row {before + 1}: {reason}") from None
        half = len(batch) // 2
        return _listed(batch.slice(0, half), path, before) + _listed(batch.slice(half), path, before + half)


def _check_columns(names: Sequence[str], path: Path | UPath) -> None:
    if twins := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two columns are named {twins[0]!r}")


def _not_parquet(path: Path | UPath, error: Exception) -> DataError:
    head = read_bytes(path, 0, len(LFS_POINTER))
    if head == LFS_POINTER:
        return DataError(f"{path}: is a Git LFS pointer, not the data itself: run `git lfs pull` where it was cloned")
    if not head:
        return DataError(f"{path}: is empty, not a Parquet file")
    cut = " (it seems cut off)" if head.startswith(_MAGIC) else ""
    return DataError(f"{path}: not a Parquet file{cut}: {str(error).splitlines()[0]}")


def write_parquet(path: Path | UPath | str, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Writes one Parquet file atomically."""
    with written_beside(path) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group_rows)


def parquet_files(path: Path | UPath | str) -> list[UPath]:
    """The Parquet files at a path: the file itself, or those in the folder, in name order.

    Raises:
        DataError: there are none.
    """
    where = location(path)
    if (there := what_is_at(where)) == "file":
        return [where]
    names = [found.name for found in files_below(where, deep=False)]
    files = [where / name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    if not files:
        raise DataError(f"{path}: {'holds no .parquet file' if there else 'no such file or folder'}")
    return files


def read_parquet(path: Path | UPath | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file or a folder of them, as our stages write them.

    Raises:
        DataError: nothing is there, a file is not Parquet, a column is missing (those present are named), or two files
            hold different types in one.
    """
    tables = []
    for file in parquet_files(path):
        try:
            with opened(file) as stream, pq.ParquetFile(stream) as parquet:
                present = parquet.schema_arrow.names
                missing = [name for name in columns or () if name not in present]
                if missing:
                    raise DataError(f"{file}: no column {missing[0]!r}; it has: {', '.join(present)}")
                tables.append(parquet.read(columns=list(columns) if columns else None))
        except (pa.ArrowException, *storage_errors()) as error:
            raise _not_parquet(file, error) from None
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{path}: its files do not fit together: {str(error).splitlines()[0]}") from None
