"""Loading a bench: items with their values, rubrics and siblings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from janus_ray.errors import DataError
from janus_ray.eval.items import BenchItem
from janus_ray.records import shortened
from janus_ray.store.tables import Row, read_rows

# What rows without a split form together where others have one: "all" stands for the whole bench in every table.
UNNAMED_SPLIT = "unnamed"


def load_bench(path: str, max_prompts_per_split: int | None = None) -> list[BenchItem]:
    """Reads the items in the order of their rows.

    Args:
        path: a file, a folder of files, or the id of a published bench.
        max_prompts_per_split: take at most this many prompts of each split.

    Raises:
        DataError: the bench is missing or empty, a row cannot be read, or two rows contradict each other; one line
            with the rows' places.
    """
    placed = [(row.place, _item(path, row)) for row in read_rows(path)]
    if not placed:
        raise DataError(f"bench {path}: holds no item")
    _check_ids(path, placed)
    items = _with_split_names(path, placed)
    return _first_prompts(items, max_prompts_per_split) if max_prompts_per_split else items


def siblings(items: Sequence[BenchItem]) -> dict[str, list[BenchItem]]:
    """Items by prompt: the same prompt, asked by people with other values."""
    grouped: dict[str, list[BenchItem]] = {}
    for item in items:
        grouped.setdefault(item.prompt_id, []).append(item)
    return grouped


def _item(path: str, row: Row) -> BenchItem:
    try:
        return BenchItem.from_row(row.values)
    except KeyError as error:
        columns = shortened(", ".join(map(str, row.values)), 200)
        raise DataError(f"bench {path}, {row.place}: no column {error}; it has: {columns}") from None
    except DataError as error:
        raise DataError(f"bench {path}, {row.place}: {error}") from None


def _check_ids(path: str, placed: Sequence[tuple[str, BenchItem]]) -> None:
    """Refuses rows that the numbers would take for one person, or for siblings that they are not.

    Raises:
        DataError: two rows have one item_id, or one prompt_id stands for two prompts.
    """
    by_item: dict[str, tuple[str, BenchItem]] = {}
    by_prompt: dict[str, tuple[str, BenchItem]] = {}
    for place, item in placed:
        first_place, first = by_item.setdefault(item.item_id, (place, item))
        if first is not item:
            same = "are the same" if first == item else f"have the same item_id {shortened(item.item_id)!r}"
            raise DataError(f"bench {path}: {first_place} and {place} {same}; each row needs an item_id of its own")
        first_place, first = by_prompt.setdefault(item.prompt_id, (place, item))
        if first.prompt != item.prompt:
            name = shortened(item.prompt_id)
            raise DataError(
                f"bench {path}: {first_place} and {place} have prompt_id {name!r} for two different prompts"
            )


def _with_split_names(path: str, placed: Sequence[tuple[str, BenchItem]]) -> list[BenchItem]:
    """The items; beside named splits, those without one form a split of their own.

    Raises:
        DataError: there is a split of that name already.
    """
    items = [item for _, item in placed]
    splits = {item.split for item in items}
    if len(splits) == 1:
        return items
    if "all" in splits and UNNAMED_SPLIT in splits:
        raise DataError(f"bench {path}: the splits 'all' and {UNNAMED_SPLIT!r} stand side by side; rename one")
    return [replace(item, split=UNNAMED_SPLIT) if item.split == "all" else item for item in items]


def _first_prompts(items: Sequence[BenchItem], limit: int) -> list[BenchItem]:
    kept: dict[str, dict[str, None]] = {}
    for item in items:
        prompts = kept.setdefault(item.split, {})
        if len(prompts) < limit:
            prompts[item.prompt_id] = None
    return [item for item in items if item.prompt_id in kept[item.split]]
