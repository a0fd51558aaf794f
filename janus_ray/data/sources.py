"""Reading instructions from files and datasets into one list without exact duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from janus_ray.data.recipe import Source
from janus_ray.errors import DataError
from janus_ray.records import Instruction, content_id
from janus_ray.store.tables import read_jsonl, read_parquet


def read_instructions(sources: Sequence[Source]) -> tuple[list[Instruction], dict[str, int]]:
    """Reads all sources in order and drops exact duplicates.

    Two instructions are equal when they are the same text but for white space at the ends and its amount inside.

    Returns:
        The instructions, and the counts "read", "empty" and "duplicate".

    Raises:
        DataError: a source is missing, unreadable, without the named column, or nothing is left.
    """
    kept: dict[str, Instruction] = {}
    counts = {"read": 0, "empty": 0, "duplicate": 0}
    for source in sources:
        for row_number, row in enumerate(islice(_rows(source), source.limit)):
            counts["read"] += 1
            prompt = _prompt(row, source, row_number)
            prompt_id = content_id(" ".join(prompt.split()))
            if not prompt:
                counts["empty"] += 1
            elif prompt_id in kept:
                counts["duplicate"] += 1
            else:
                kept[prompt_id] = _instruction(prompt_id, prompt, row, source, row_number)
    if not kept:
        raise DataError(
            f"no instruction in {', '.join(source.path for source in sources)} ({counts['read']} rows read)"
        )
    return list(kept.values()), counts


def _rows(source: Source) -> Iterable[Mapping[str, Any]]:
    kind = _format_of(source)
    if kind == "jsonl":
        return read_jsonl(source.path)
    if kind == "parquet":
        return read_parquet(source.path).to_pylist()
    return _huggingface_rows(source)


def _format_of(source: Source) -> str:
    if source.format != "auto":
        return source.format
    path = Path(source.path)
    if path.suffix in (".jsonl", ".json"):
        return "jsonl"
    if path.suffix == ".parquet" or path.is_dir():
        return "parquet"
    if path.exists():
        raise DataError(f"source {source.path}: unknown ending {path.suffix!r}; set format to jsonl or parquet")
    if source.path.count("/") > 1 or source.path.startswith((".", "/", "~")):
        raise DataError(f"source {source.path}: no such file or folder")
    return "huggingface"


def _huggingface_rows(source: Source) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"source {source.path}: neither a file here nor a dataset that can be loaded "
            f"(split {source.split!r}): {str(error).splitlines()[0]}"
        ) from None


def _prompt(row: Mapping[str, Any], source: Source, row_number: int) -> str:
    prompt = _text_at(row, source.prompt_column, source, row_number)
    extra = _text_at(row, source.input_column, source, row_number) if source.input_column else ""
    return f"{prompt}\n\n{extra}" if prompt and extra else prompt


def _instruction(prompt_id: str, prompt: str, row: Mapping[str, Any], source: Source, row_number: int) -> Instruction:
    name = source.name or Path(source.path).stem
    original = _text_at(row, source.source_column, source, row_number) if source.source_column else name
    return Instruction(prompt_id, main_source=name, original_source=original, prompt=prompt)


def _text_at(row: Mapping[str, Any], path: str, source: Source, row_number: int) -> str:
    """The text at a dotted path; None counts as empty.

    Raises:
        DataError: there is no such column, or it holds something else than text.
    """
    value: Any = row
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, Sequence) and not isinstance(value, str) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise DataError(
                f"source {source.path}, row {row_number}: no column {path!r}; it has: {', '.join(map(str, row))}"
            ) from None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"source {source.path}, row {row_number}: column {path!r} holds {type(value).__name__}, expected text"
        )
    return value.strip()
