"""Reading instructions from files and datasets, without exact duplicates and without holding them in memory.

All sources are read before anything else happens, so that what is wrong with one of them costs nothing. What they give
lies in a temporary file from then on; in memory stay 16 bytes for each instruction, and about a hundred while reading.
A row that cannot be used is left out, counted by its reason and said; a source that can give nothing is an error.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from janus_ray.data.recipe import Source
from janus_ray.errors import DataError
from janus_ray.progress import ProgressLine
from janus_ray.records import INSTRUCTIONS, Instruction, content_id
from janus_ray.store.files import os_reason
from janus_ray.store.hub import hub_id
from janus_ray.store.tables import Row, read_rows
from janus_ray.text import is_blank

_ABSENT = object()
_BATCH_ROWS = 1024
_LISTED_COLUMNS = 30
_SHOWN_CHARACTERS = 200

# What is counted, in words for the terminal.
_REASONS = {
    "no_prompt_column": "without the column {prompt_column!r}",
    "prompt_not_text": "with something else than text in {prompt_column!r}",
    "input_not_text": "with something else than text in {input_column!r}",
}


class Instructions:
    """Instructions in the order of their sources, on disk; they can be gone through many times, one pass at a time."""

    def __init__(self, unique: Iterable[Instruction]) -> None:
        """Takes them all.

        Raises:
            DataError: the temporary folder has no room for them.
        """
        self._file = tempfile.TemporaryFile(prefix="janus_ray-instructions-")  # noqa: SIM115 - open as long as we are
        ids, contents = array("Q"), array("Q")
        remaining = iter(unique)
        try:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            with pa.ipc.new_file(pa.PythonFile(self._file, "w"), INSTRUCTIONS, options=options) as writer:
                while some := list(islice(remaining, _BATCH_ROWS)):
                    ids.extend(id_number(each.prompt_id) for each in some)
                    contents.extend(content_number(each) for each in some)
                    writer.write_batch(pa.RecordBatch.from_pylist([asdict(each) for each in some], INSTRUCTIONS))
            self._file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise DataError(f"{where}: the instructions cannot be kept there: {os_reason(error)}") from None
        self.ids: np.ndarray = np.frombuffer(ids, dtype=np.uint64)
        """uint64[instructions]: their prompt ids as numbers."""
        self.contents: np.ndarray = np.frombuffer(contents, dtype=np.uint64)
        """uint64[instructions]: numbers that change with anything that a row takes from its instruction."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Instruction]:
        self._file.seek(0)
        reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        for number in range(reader.num_record_batches):
            for row in reader.get_batch(number).to_pylist():
                yield Instruction(**row)

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()


def id_number(prompt_id: str) -> int:
    """A prompt id (16 hexadecimal digits) as a number."""
    return int(prompt_id, 16)


def content_number(instruction: Instruction) -> int:
    """A number that changes with anything that a row takes from its instruction."""
    fields = (instruction.prompt_id, instruction.main_source, instruction.original_source, instruction.prompt)
    return xxhash.xxh3_64_intdigest("\x1f".join(fields).encode())


def read_instructions(sources: Sequence[Source]) -> tuple[Instructions, dict[str, int]]:
    """Reads all sources in order and drops exact duplicates.

    Two instructions are equal when they are the same text but for white space at the ends and its amount inside.

    Returns:
        The instructions, and the counts "read", "empty" and "duplicate"; where there were any, also the rows left out
        as "no_prompt_column", "prompt_not_text" and "input_not_text", and those read "without_input_column".

    Raises:
        DataError: a source is missing or unreadable, no row of it has the named column or a text in it, or nothing is
            left.
    """
    counts = Counter({"read": 0, "empty": 0, "duplicate": 0})
    found = Instructions(_unique(sources, counts))
    if not len(found):
        raise DataError(
            f"no instruction in {', '.join(source.path for source in sources)} ({counts['read']} rows read)"
        )
    return found, dict(counts)


def _unique(sources: Sequence[Source], counts: Counter[str]) -> Iterator[Instruction]:
    """The instructions of all sources, the first of equal ones."""
    progress = ProgressLine("collect: rows read")
    seen: set[int] = set()
    for source in sources:
        reader = _Reader(source)
        for prompt, original in reader.prompts():
            prompt_id = content_id(" ".join(prompt.split()))
            number = id_number(prompt_id)
            if number in seen:
                counts["duplicate"] += 1
            else:
                seen.add(number)
                yield Instruction(prompt_id, main_source=reader.name, original_source=original, prompt=prompt)
            progress.update(counts["read"] + reader.counts["read"])
        reader.close()
        counts.update(reader.counts)


class _Reader:
    """One source: its prompts, what was left out, and whether its columns exist at all."""

    def __init__(self, source: Source) -> None:
        self.counts: Counter[str] = Counter()
        self._source = source
        found = hub_id(source.path)
        self.name = source.name or (found.name if found else PurePosixPath(source.path).stem)
        # Columns that the recipe names, and whether any row has had them.
        named = (source.prompt_column, source.input_column, source.source_column)
        self._seen = {column: False for column in named if column}
        self._columns: dict[str, None] = {}
        self._first: dict[str, str] = {}

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Prompt and original source of each usable row."""
        source = self._source
        for row in islice(read_rows(source.path, split=source.split), source.limit):
            self.counts["read"] += 1
            if len(self._columns) < _LISTED_COLUMNS:
                self._columns.update(dict.fromkeys(row.values))
            prompt = self._at(row, source.prompt_column)
            extra = self._at(row, source.input_column)
            original = self._at(row, source.source_column)
            if prompt is _ABSENT:
                self._leave_out("no_prompt_column", row, None)
            elif not isinstance(prompt, str):
                self._leave_out("prompt_not_text", row, prompt)
            elif extra is not _ABSENT and not isinstance(extra, str):
                self._leave_out("input_not_text", row, extra)
            elif is_blank(prompt):
                self.counts["empty"] += 1
            else:
                if source.input_column and extra is _ABSENT:
                    self.counts["without_input_column"] += 1
                text = f"{prompt}\n\n{extra}" if isinstance(extra, str) and not is_blank(extra) else prompt
                yield text, str(original) if isinstance(original, str | int) and original != "" else self.name

    def close(self) -> None:
        """Says what was left out.

        Raises:
            DataError: a named column is in no row, or no row has a text where the prompt belongs.
        """
        if not self.counts["read"]:
            return
        for column, seen in self._seen.items():
            if not seen:
                listed = _cut(", ".join(map(str, self._columns)))
                raise DataError(f"source {self._source.path}: no column {column!r}; it has: {listed or 'none'}")
        for reason in ("prompt_not_text", "input_not_text"):
            if self.counts[reason] and self.counts[reason] == self.counts["read"]:
                raise DataError(f"source {self._source.path}, {self._first[reason]}")
        for reason, words in _REASONS.items():
            if self.counts[reason]:
                said = words.format(prompt_column=self._source.prompt_column, input_column=self._source.input_column)
                print(
                    f"source {self._source.path}: left out {self.counts[reason]} of {self.counts['read']} rows "
                    f"{said}; the first: {self._first[reason]}",
                    flush=True,
                )

    def _at(self, row: Row, column: str | None) -> Any:
        """The value at a dotted path, stripped; null and nan are an empty text, a path that leads nowhere `_ABSENT`."""
        if column is None:
            return _ABSENT
        value = _value_at(row.values, column)
        if value is _ABSENT:
            return _ABSENT
        self._seen[column] = True
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return value.strip() if isinstance(value, str) else value

    def _leave_out(self, reason: str, row: Row, value: Any) -> None:
        self.counts[reason] += 1
        column = self._source.input_column if reason == "input_not_text" else self._source.prompt_column
        kind = f": column {column!r} holds {type(value).__name__}, expected text" if value is not None else ""
        self._first.setdefault(reason, row.place + kind)


def _value_at(values: Mapping[str, Any], column: str) -> Any:
    if column in values:
        return values[column]
    found: Any = values
    for part in column.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return _ABSENT
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
