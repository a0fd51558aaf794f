"""The rows to train on, out of whatever holds them: a system message or none, then prompts and answers in turns.

A row that lacks something is left out and counted; a value that is no text is refused with its row.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from janus_ray.chat import Message, conversation
from janus_ray.errors import DataError
from janus_ray.store.files import what_is_at
from janus_ray.store.hub import dataset_files
from janus_ray.store.tables import column_names, is_parquet, read_rows
from janus_ray.text import is_blank
from janus_ray.train.conversations import REASONS, is_nothing, is_null, kind, read_messages

_COLUMNS = ("system", "prompt", "output")
_MESSAGES = "messages"
_STATUS = "status"
_CHUNK_ROWS = 8192
_MESSAGE = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
_SCHEMA = pa.schema([(_MESSAGES, pa.list_(_MESSAGE))])


@dataclass(frozen=True, slots=True)
class Collection:
    """What there is to train on."""

    rows: pa.Table
    """Column messages: at most one system message, then user and assistant in turns; a row of system, prompt and
    output is a conversation of one turn."""
    counts: dict[str, int]
    """"rows" in the table and "rows_without_system" among them; and those left out, by the reason (`REASONS`)."""


def read_collection(source: str) -> Collection:
    """Reads a file, a folder of files or a published dataset with the columns system, prompt and output, or messages.

    Raises:
        DataError: it is missing or damaged, lacks a column, holds something other than text in one, fills both forms in
            one row, or has no usable row.
    """
    path = Path(os.path.expanduser(source))
    counts = dict.fromkeys(("rows", "rows_without_system", *REASONS), 0)
    chunks: list[pa.Table] = []
    kept: list[dict[str, list[Message]]] = []
    for file in [path] if what_is_at(path) == "file" else dataset_files(source):
        for place, values in _rows_of(file):
            messages = "rows_not_ok" if _is_not_ok(values, place) else _messages(values, place)
            if isinstance(messages, str):
                counts[messages] += 1
                continue
            counts["rows"] += 1
            counts["rows_without_system"] += messages[0]["role"] != "system"
            kept.append({_MESSAGES: messages})
            if len(kept) == _CHUNK_ROWS:
                chunks.append(pa.Table.from_pylist(kept, schema=_SCHEMA))
                kept = []
    if not counts["rows"]:
        raise DataError(f"{source}: no row to train on: {left_out(counts) or 'it is empty'}")
    return Collection(pa.concat_tables([*chunks, pa.Table.from_pylist(kept, schema=_SCHEMA)]), counts)


def left_out(counts: dict[str, int]) -> str:
    """The rows left out, for a person: "2 whose status is not ok, 1 without output"; empty where there are none."""
    later = {"rows_refused_by_template": "refused by the chat template", "rows_too_long": "too long"}
    return ", ".join(f"{counts[key]} {words}" for key, words in {**REASONS, **later}.items() if counts.get(key))


def _rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _check_columns(file: Path, present: list[str]) -> None:
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
