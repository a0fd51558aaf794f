"""Loading a bench: items with their values, rubrics and siblings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from janus_ray.errors import DataError
from janus_ray.records import BenchItem
from janus_ray.store.tables import read_jsonl, read_parquet


def load_bench(path: str, max_prompts_per_split: int | None = None) -> list[BenchItem]:
    """Reads the items in the file's order.

    Raises:
        DataError: the file is missing, empty, or a row lacks a column or has rubrics that do not match its values.
    """
    rows = read_jsonl(path) if Path(path).suffix in (".jsonl", ".json") else read_parquet(path).to_pylist()
    items = []
    for number, row in enumerate(rows):
        try:
            item = BenchItem.from_row(row)
        except KeyError as error:
            raise DataError(f"bench {path}, row {number}: no column {error}; it has: {', '.join(row)}") from None
        except TypeError as error:
            raise DataError(f"bench {path}, row {number}: {error}") from None
        if len(item.rubrics) != len(item.preference_set):
            raise DataError(
                f"bench {path}, row {number}: {len(item.rubrics)} rubrics for {len(item.preference_set)} preferences"
            )
        items.append(item)
    if not items:
        raise DataError(f"bench {path}: holds no item")
    return _first_prompts(items, max_prompts_per_split) if max_prompts_per_split else items


def siblings(items: Sequence[BenchItem]) -> dict[str, list[BenchItem]]:
    """Items by prompt: the same prompt, asked by people with other values."""
    grouped: dict[str, list[BenchItem]] = {}
    for item in items:
        grouped.setdefault(item.prompt_id, []).append(item)
    return grouped


def _first_prompts(items: Sequence[BenchItem], limit: int) -> list[BenchItem]:
    kept: dict[str, list[str]] = {}
    for item in items:
        prompts = kept.setdefault(item.split, [])
        if item.prompt_id not in prompts and len(prompts) < limit:
            prompts.append(item.prompt_id)
    return [item for item in items if item.prompt_id in kept[item.split]]
