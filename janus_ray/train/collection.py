"""The rows to train on, out of whatever holds them: a system message or none, then prompts and answers in turns.

A row that lacks something is left out and counted; a value that is no text is refused with its row.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
from upath import UPath

from janus_ray.chat import Message, conversation
from janus_ray.errors import DataError
from janus_ray.store.files import os_reason, what_is_at
from janus_ray.store.hub import dataset_files, hub_id
from janus_ray.store.location import location
from janus_ray.store.tables import column_names, is_parquet, read_rows
from janus_ray.text import is_blank
from janus_ray.train.conversations import REASONS, is_nothing, is_null, kind, read_messages

_COLUMNS = ("system", "prompt", "output")
_MESSAGES = "messages"
_STATUS = "status"
# Also the rows of a shard of documents: whoever changes it changes the hash of every run's documents.
BATCH_ROWS = 2048
_MESSAGE = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
_SCHEMA = pa.schema([(_MESSAGES, pa.list_(_MESSAGE))])


class Rows:
    """Conversations in a temporary file of this machine, gone with this object: written once, then read in batches.

    Each has at most one system message, then user and assistant in turns. Their number is bounded by no memory.
    """

    def __init__(self, conversations: Iterable[list[Message]]) -> None:
        """Writes them all.

        Raises:
            DataError: the temporary folder is full.
        """
        self._file = tempfile.TemporaryFile(prefix="janus_ray-rows-")  # noqa: SIM115 - lives as long as this object
        self._count = 0
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        writer = pa.ipc.new_file(self._opened("wb"), _SCHEMA, options=options)
        remaining = iter(conversations)
        while kept := [{_MESSAGES: messages} for messages in islice(remaining, BATCH_ROWS)]:
            self._count += len(kept)
            with _named_when_full():
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=_SCHEMA))
        with _named_when_full():
            writer.close()

    def __len__(self) -> int:
        return self._count

    def batches(self) -> Iterator[pa.Table]:
        """Tables with the column messages, of `BATCH_ROWS` rows; the last may have fewer."""
        reader = self._reader()
        return (pa.Table.from_batches([reader.get_batch(number)]) for number in range(reader.num_record_batches))

    def take(self, indices: Iterable[int]) -> list[list[Message]]:
        """The conversations at some ascending indices."""
        reader = self._reader()
        return [
            messages
            for number, several in groupby(indices, key=lambda index: index // BATCH_ROWS)
            for messages in reader.get_batch(number)[_MESSAGES]
            .take(pa.array([index % BATCH_ROWS for index in several]))
            .to_pylist()
        ]

    def _reader(self) -> Any:
        return pa.ipc.open_file(self._opened("rb"))

    def _opened(self, mode: str) -> pa.PythonFile:
        # Of its own, because Arrow closes what it was given; the file itself stays as long as one is open.
        return pa.PythonFile(os.fdopen(os.dup(self._file.fileno()), mode), mode=mode[0])


@contextmanager
def _named_when_full() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: the rows cannot be kept there while they are read: {os_reason(error)}; "
            "TMPDIR names another folder"
        ) from None


@dataclass(frozen=True, slots=True)
class Collection:
    """What there is to train on."""

    rows: Rows
    """A row of system, prompt and output is a conversation of one turn."""
    counts: dict[str, int]
    """"rows" in the file and "rows_without_system" among them; and those left out, by the reason (`REASONS`)."""


def read_collection(source: str) -> Collection:
    """Reads a file, a folder of files or a published dataset with the columns system, prompt and output, or messages.

    Raises:
        DataError: it is missing or damaged, lacks a column, holds something other than text in one, fills both forms in
            one row, or has no usable row.
    """
    counts = dict.fromkeys(("rows", "rows_without_system", *REASONS), 0)
    rows = Rows(_usable(source, counts))
    if not counts["rows"]:
        raise DataError(f"{source}: no row to train on: {left_out(counts) or 'it is empty'}")
    return Collection(rows, counts)


def _usable(source: str, counts: dict[str, int]) -> Iterator[list[Message]]:
    """The conversations to train on; counts them, and what is left out."""
    is_file = hub_id(source) is None and what_is_at(source) == "file"
    for file in [location(source)] if is_file else dataset_files(source):
        for place, values in _rows_of(file):
            messages = "rows_not_ok" if _is_not_ok(values, place) else _messages(values, place)
            if isinstance(messages, str):
                counts[messages] += 1
                continue
            counts["rows"] += 1
            counts["rows_without_system"] += messages[0]["role"] != "system"
            yield messages


def left_out(counts: dict[str, int]) -> str:
    """The rows left out, for a person: "2 whose status is not ok, 1 without output"; empty where there are none."""
    later = {"rows_refused_by_template": "refused by the chat template", "rows_too_long": "too long"}
    return ", ".join(f"{counts[key]} {words}" for key, words in {**REASONS, **later}.items() if counts.get(key))


def _rows_of(file: UPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with the place that messages name.

    Raises:
        DataError: a column is missing: in a table by its header, in JSON where no row has it.
    """
    if is_parquet(file):
        _check_columns(file, column_names(file))
    present: Counter[str] = Counter()
    for row in read_rows(str(file), columns=(*_COLUMNS, _MESSAGES, _STATUS)):
        present.update(row.values.keys())
        yield f"{file}, {row.place}", row.values
    if present:
        _check_columns(file, list(present))


def _check_columns(file: UPath, present: list[str]) -> None:
    missing = [name for name in _COLUMNS if name not in present]
    if missing and _MESSAGES not in present:
        shown = ", ".join(present[:20])
        raise DataError(
            f"{file}: no column {missing[0]!r}; it has: {shown}{', ...' if len(present) > 20 else ''}; "
            f"expected system, prompt and output, or {_MESSAGES}"
        )


def _is_not_ok(values: dict[str, Any], place: str) -> bool:
    """Whether a row failed where it was made. Collections of others have no such column; a null in ours is not "ok"."""
    return _STATUS in values and _text(values, _STATUS, place) != "ok"


def _messages(values: dict[str, Any], place: str) -> list[Message] | str:
    """The conversation of a row, or why it is left out.

    Raises:
        DataError: a value is of another type, or the row says two things.
    """
    texts = _texts(values, place)
    if is_nothing(values.get(_MESSAGES)):
        return _one_turn(texts)
    messages = read_messages(values[_MESSAGES], place)
    # Published sets repeat the first prompt beside the messages.
    repeated = (
        texts["prompt"] is None or isinstance(messages, str) or _first_prompt(messages) == texts["prompt"].strip()
    )
    beside = [name for name in ("system", "output") if texts[name]] + ([] if repeated else ["prompt"])
    if beside:
        raise DataError(f"{place}: both {_MESSAGES} and {beside[0]} are filled; one of the two must be empty")
    return messages


def _one_turn(texts: dict[str, str | None]) -> list[Message] | str:
    prompt, output = texts["prompt"], texts["output"]
    if prompt is None:
        return "rows_without_prompt"
    if output is None:
        return "rows_without_output"
    return [*conversation(texts["system"], prompt), {"role": "assistant", "content": output}]


def _first_prompt(messages: list[Message]) -> str:
    return next(message["content"].strip() for message in messages if message["role"] == "user")


def _texts(values: dict[str, Any], place: str) -> dict[str, str | None]:
    """The columns of a row; None for what is absent, null or blank."""
    texts = {name: _text(values, name, place) for name in _COLUMNS}
    return {name: None if text is None or is_blank(text) else text for name, text in texts.items()}


def _text(values: dict[str, Any], name: str, place: str) -> str | None:
    value = values.get(name)
    if isinstance(value, str):
        return value
    if is_null(value):
        return None
    raise DataError(f"{place}: {name} is {kind(value)}, expected text")
