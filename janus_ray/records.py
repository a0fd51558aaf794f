"""The records that cross a stage border, and their pyarrow schemas.

The first six columns of `COLLECTION` are those of the published Multifaceted Collection
(Lee et al. 2024, arXiv 2405.17977; `kaist-ai/Multifaceted-Collection`), with the published names and types, so that
the published files load as they are; behind them stand our ids, the status and what the row cost. `BENCH` extends
`kaist-ai/Multifaceted-Bench` in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

# The paper's four dimensions (section 3.1), in the order in which we always write them.
DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")

Status = Literal["ok", "error"]

PREFERENCE_TYPE = pa.struct(
    [(name, pa.string()) for name in ("dimension", "subdimension", "preference", "description")]
)

# The published columns, exactly.
PUBLISHED = pa.schema(
    [
        ("main_source", pa.string()),
        ("original_source", pa.string()),
        ("preference_set", pa.list_(PREFERENCE_TYPE)),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("output", pa.string()),
    ]
)

COLLECTION = pa.schema(
    [
        *PUBLISHED,
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("set_index", pa.int32()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)

INSTRUCTIONS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("main_source", pa.string()),
        ("original_source", pa.string()),
        ("prompt", pa.string()),
    ]
)

RUBRIC_TYPE = pa.struct(
    [
        ("criteria", pa.string()),
        ("score_descriptions", pa.struct([(str(score), pa.string()) for score in range(1, 6)])),
    ]
)

BENCH = pa.schema(
    [
        ("source", pa.string()),
        ("preference_set", pa.list_(PREFERENCE_TYPE)),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("reference_answer", pa.string()),
        ("rubrics", pa.list_(RUBRIC_TYPE)),
        ("item_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Preference:
    """One value of one person: where it stands in the hierarchy, and one sentence that states it."""

    dimension: str
    subdimension: str
    preference: str
    description: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """One user request that preference sets are written for."""

    prompt_id: str
    main_source: str
    original_source: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Rubric:
    """What a judge looks at for one preference, with an anchor for each score from "1" to "5"."""

    criteria: str
    score_descriptions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BenchItem:
    """One prompt with one person's values, a reference answer, and one rubric for each preference.

    Items with the same `prompt_id` are siblings: the same prompt, asked by people with other values.
    """

    source: str
    preference_set: tuple[Preference, ...]
    system: str
    prompt: str
    reference_answer: str
    rubrics: tuple[Rubric, ...]
    item_id: str
    prompt_id: str
    split: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> BenchItem:
        """Builds an item from one row of a `BENCH` table.

        Rows of the published bench, which carry none of our three ids, get ids derived from their content and the
        split "all".

        Raises:
            KeyError, TypeError: a published column is missing or has another type.
        """
        preferences = tuple(Preference(**preference) for preference in row["preference_set"])
        rubrics = tuple(Rubric(rubric["criteria"], dict(rubric["score_descriptions"])) for rubric in row["rubrics"])
        return cls(
            source=row["source"],
            preference_set=preferences,
            system=row["system"],
            prompt=row["prompt"],
            reference_answer=row["reference_answer"],
            rubrics=rubrics,
            item_id=row.get("item_id") or content_id(row["prompt"], row["system"]),
            prompt_id=row.get("prompt_id") or content_id(row["prompt"]),
            split=row.get("split") or "all",
        )


def content_id(*parts: str) -> str:
    """A short id that depends on nothing but the text: 16 hex digits of SHA-256."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """One spelling for equal values: sorted keys, no spaces, no ASCII escapes. The base of every content key."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def as_rows(preferences: Sequence[Preference]) -> list[dict[str, str]]:
    """The preferences as plain dictionaries, the form that pyarrow and JSON take."""
    return [asdict(preference) for preference in preferences]


def in_dimension_order(preferences: Sequence[Preference]) -> list[Preference]:
    """The preferences in the order of `DIMENSIONS`; unknown dimensions follow by name, ties by text.

    Every text written from a set of values goes through this order, so that equal sets give equal bytes.
    """
    rank = {dimension: index for index, dimension in enumerate(DIMENSIONS)}
    return sorted(
        preferences,
        key=lambda p: (rank.get(p.dimension, len(rank)), p.dimension, p.subdimension, p.preference, p.description),
    )
