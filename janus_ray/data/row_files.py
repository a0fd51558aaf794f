"""The rows of a collection on disk: those of an earlier run that a resume keeps, and new ones as they come."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from janus_ray.data.recipe import CollectRecipe
from janus_ray.data.sources import Instructions, content_number, id_number
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.prompts import prompt_sha256
from janus_ray.records import COLLECTION, Instruction, canonical_json
from janus_ray.store.files import Found, delete_files, files_below
from janus_ray.store.location import location, one_line_errors
from janus_ray.store.tables import write_parquet

_MADE_WITH = b"janus_ray.made_with"
_BATCH_ROWS = 1024
_FROM_INSTRUCTION = ("prompt_id", "main_source", "original_source", "prompt")
_SUMMED = ("attempts", "prompt_tokens", "completion_tokens")


def made_with(recipe: CollectRecipe, teacher: ReachedEndpoint) -> str:
    """What tells rows of one teacher, recipe and prompt text from those of another; not the instructions."""
    stages = ("preference_sets", "system_message")
    content = {
        "teacher": [teacher.model, teacher.identity, list(teacher.omit)],
        "sampling": recipe.sampling.model_dump(mode="json"),
        "num_sets": recipe.num_sets,
        "seed": recipe.seed,
        "prompts": [prompt_sha256(stage) for stage in stages],
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


class RowFiles:
    """The Parquet files of one collection."""

    def __init__(
        self,
        folder: Path | UPath | str,
        origin: str,
        rows_per_file: int,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where the files lie.
            origin: see `made_with`.
            rows_per_file: rows in each file but the last.
            before_writing: called before a file is written or deleted; raises where the folder is not ours any more.
        """
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """Number of failed rows by kind of error."""
        self.first_failure = ""
        self.files = 0
        self._folder = location(folder)
        self._origin = origin
        self._rows_per_file = rows_per_file
        self._before_writing = before_writing
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self._taken: set[str] = set()

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self.counts["rows_ok"] + self.counts["rows_failed"]

    def keep(self, instructions: Instructions, num_sets: int) -> np.ndarray:
        """Keeps the rows of instructions that an earlier run finished, whole and without an error; others are deleted.

        What is deleted is made again from the ledger. Files that are whole stay as they are.

        Returns:
            bool[instructions], in their order: whether all rows of one are kept.

        Raises:
            DataError: a file cannot be deleted or written.
        """
        files = [found for found in files_below(self._folder, deep=False) if _is_ours(found.name)]
        rows = [_row_numbers(found, self._origin) for found in files]
        order = np.argsort(instructions.ids, kind="stable")
        ids, contents = instructions.ids[order], instructions.contents[order]
        # uint64[rows]: id and content of the instruction; where one row is as it must be, its set, elsewhere -1.
        row_ids, row_contents, row_sets = (np.concatenate(part) for part in zip(*rows, strict=True)) if rows else _NONE
        at = np.minimum(np.searchsorted(ids, row_ids), len(ids) - 1)
        good = (ids[at] == row_ids) & (contents[at] == row_contents) & (row_sets >= 0) & (row_sets < num_sets)
        present = np.zeros(len(ids), dtype=np.int64)
        np.bitwise_or.at(present, at[good], 1 << row_sets[good])
        done = present == (1 << num_sets) - 1
        kept = np.zeros(len(row_ids), dtype=bool)
        candidates = np.flatnonzero(good & done[at])
        # Of rows that are there twice, because a run was killed while it rewrote a file, the first.
        kept[candidates[np.unique(at[candidates] * num_sets + row_sets[candidates], return_index=True)[1]]] = True
        start = 0
        for found, (numbers, _, _) in zip(files, rows, strict=True):
            self._keep_of(found, kept[start : start + len(numbers)])
            start += len(numbers)
        in_order = np.zeros(len(ids), dtype=bool)
        in_order[order] = done
        return in_order

    def add(self, rows: pa.Table) -> None:
        """Takes rows and writes whole files' worth of them.

        Raises:
            DataError: a file cannot be written.
        """
        self._count(rows)
        for kind, message in zip(rows["error_kind"].to_pylist(), rows["error_message"].to_pylist(), strict=True):
            if kind:
                self.failures[kind] += 1
                self.first_failure = self.first_failure or message or kind
        self._pend(rows)

    def close(self) -> None:
        """Writes what remains.

        Raises:
            DataError: a file cannot be written.
        """
        if self._num_pending:
            self._write(pa.concat_tables(self._pending))
            self._pending, self._num_pending = [], 0

    def _keep_of(self, found: Found, kept: np.ndarray) -> None:
        if not kept.any():
            self._delete(found)
            return
        is_whole = kept.all() and len(kept) == self._rows_per_file
        table = _read(found, _SUMMED if is_whole else COLLECTION.names).filter(pa.array(kept))
        self.counts["rows_ok"] += len(table)
        self._sum(table)
        if is_whole:
            self._taken.add(found.name)
            self.files += 1
        else:
            self._delete(found)
            self._pend(table)

    def _delete(self, found: Found) -> None:
        self._before_writing()
        delete_files([found])

    def _count(self, rows: pa.Table) -> None:
        statuses = rows["status"].to_pylist()
        self.counts["rows_ok"] += statuses.count("ok")
        self.counts["rows_failed"] += statuses.count("error")
        self._sum(rows)

    def _sum(self, rows: pa.Table) -> None:
        for name in _SUMMED:
            self.counts[name] += sum(rows[name].to_pylist())

    def _pend(self, rows: pa.Table) -> None:
        self._pending.append(rows.select(COLLECTION.names).cast(COLLECTION))
        self._num_pending += len(rows)
        while self._num_pending >= self._rows_per_file:
            table = pa.concat_tables(self._pending)
            self._write(table.slice(0, self._rows_per_file))
            self._pending = [table.slice(self._rows_per_file)]
            self._num_pending -= self._rows_per_file

    def _write(self, table: pa.Table) -> None:
        number = self.files
        while (name := f"part-{number:05d}.parquet") in self._taken:
            number += 1
        # Rows arrive in the order of their answers; inside a file the order is that of their ids.
        table = table.sort_by([("prompt_id", "ascending"), ("set_index", "ascending")])
        self._before_writing()
        write_parquet(self._folder / name, table.replace_schema_metadata({_MADE_WITH: self._origin}))
        self._taken.add(name)
        self.files += 1


_NONE = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64)


def _is_ours(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _row_numbers(found: Found, origin: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Id, content and set of each row; the set is -1 where the row failed, or in a file that is not of this origin."""
    try:
        return _numbers_of(found, origin)
    # Written by somebody else, or by an earlier version: made again.
    except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return _NONE


def _numbers_of(found: Found, origin: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids: list[int] = []
    contents: list[int] = []
    sets: list[int] = []
    with one_line_errors(found.where), found.where.open("rb") as stream, pq.ParquetFile(stream) as file:
        if (file.schema_arrow.metadata or {}).get(_MADE_WITH) != origin.encode():
            return _NONE
        columns = [*_FROM_INSTRUCTION, "set_index", "status"]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                instruction = Instruction(**{name: row[name] for name in _FROM_INSTRUCTION})
                ids.append(id_number(instruction.prompt_id))
                contents.append(content_number(instruction))
                sets.append(row["set_index"] if row["status"] == "ok" else -1)
    return np.array(ids, np.uint64), np.array(contents, np.uint64), np.array(sets, np.int64)


def _read(found: Found, columns: Any) -> pa.Table:
    with one_line_errors(found.where), found.where.open("rb") as stream:
        return pq.read_table(stream, columns=list(columns))


def unfinished(instructions: Instructions, done: np.ndarray) -> Iterator[Instruction]:
    """The instructions that are not done."""
    return (instruction for instruction, is_done in zip(instructions, done, strict=True) if not is_done)
