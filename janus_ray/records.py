"""The records that cross a stage border, and their pyarrow schemas.

The first six columns of `COLLECTION` are those of the published Multifaceted Collection
(Lee et al. 2024, arXiv 2405.17977; `kaist-ai/Multifaceted-Collection`), with the published names and types, so that
the published files load as they are; behind them stand our ids, the status and what the row cost. `BENCH` extends
`kaist-ai/Multifaceted-Bench` in the same way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow as pa

from janus_ray.errors import DataError
from janus_ray.text import is_blank, well_formed

# The paper's four dimensions (section 3.1), in the order in which we always write them.
DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")

# What a rubric describes, as the published bench spells it.
_SCORES = ("1", "2", "3", "4", "5")
# Digits of the longest number that is taken for a name.
_LONGEST_NUMBER = 30
_ANY_SCORE = re.compile(r"score[_ ]?\d+(?:[_ ]description)?", flags=re.IGNORECASE)

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
    """What a judge looks at for one preference, with anchors for scores from "1" to "5".

    All five anchors, those of some scores with both ends among them, or none.
    """

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
    """Empty where there is none."""
    rubrics: tuple[Rubric, ...]
    item_id: str
    prompt_id: str
    split: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> BenchItem:
        """Builds an item from one row of a `BENCH` table.

        Rows of the published bench, which carry none of our three ids, get ids derived from their content and the
        split "all". Numbers stand for their text where a name or an id is expected. Rubrics are read in the published
        form and in Prometheus' (`rubric`, `score1_description`); see `_rubric`.

        Raises:
            KeyError: a published column is missing.
            DataError: a value cannot be read; one line without the row's place.
        """
        preferences = _entries(row, "preference_set")
        name = "rubric" if "rubric" in row and _is_missing(row.get("rubrics")) else "rubrics"
        if name == "rubrics" and not _is_missing(row.get("rubric")):
            raise DataError("has both rubric and rubrics; leave one out")
        rubrics = _entries(row, name)
        if not preferences and not rubrics:
            raise DataError("has no preferences and no rubrics: there is nothing to judge")
        if len(rubrics) != len(preferences):
            raise DataError(f"{len(rubrics)} rubrics for {len(preferences)} preferences")
        prompt, system = (_text(row, name, required=True) for name in ("prompt", "system"))
        split = _name(row.get("split"), "split")
        # A prompt in two splits is two.
        within = (split,) if split else ()
        return cls(
            source=_name(row.get("source"), "source") or "",
            preference_set=tuple(_preference(entry, number) for number, entry in enumerate(preferences, start=1)),
            system=system,
            prompt=prompt,
            reference_answer=_text(row, "reference_answer", required=False),
            rubrics=tuple(_rubric(entry, number) for number, entry in enumerate(rubrics, start=1)),
            item_id=_name(row.get("item_id"), "item_id") or content_id(prompt, system, *within),
            prompt_id=_name(row.get("prompt_id"), "prompt_id") or content_id(prompt, *within),
            split=split or "all",
        )


def _is_missing(value: object) -> bool:
    """None, and the NaN that tables of numbers write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _entries(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A column of structs; none where it is null."""
    value = row[name]
    if _is_missing(value):
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"{name} is {_kind(value)}, expected a list")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, Mapping):
            raise DataError(f"{name}, entry {number} is {_kind(entry)}, expected an object")
    return list(value)


def _text(row: Mapping[str, Any], name: str, *, required: bool) -> str:
    value = row[name] if required else row.get(name)
    if not required and (_is_missing(value) or (isinstance(value, str) and is_blank(value))):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, expected text")
    if is_blank(value):
        raise DataError(f"{name} is empty")
    return well_formed(value)


def _name(value: object, where: str) -> str | None:
    """A name or an id as text: 81 and 81.0 are "81"; None where there is none."""
    if _is_missing(value) or (isinstance(value, str) and is_blank(value)):
        return None
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or len(text := _digits(value)) > _LONGEST_NUMBER:
        raise DataError(f"{where} is {_kind(value)}, expected text or a number")
    return text


def _digits(value: float) -> str:
    """The number as text; Python itself refuses to write very long ones."""
    return "0" * (_LONGEST_NUMBER + 1) if abs(value) > 10**_LONGEST_NUMBER else str(value)


def _preference(entry: Mapping[str, Any], number: int) -> Preference:
    missing = [field.name for field in fields(Preference) if field.name not in entry]
    if missing:
        raise DataError(f"preference {number}: missing {', '.join(missing)}; it has: {_keys(entry)}")
    texts = {field.name: _name(entry[field.name], f"preference {number}: {field.name}") for field in fields(Preference)}
    if not texts["preference"] and not texts["description"]:
        raise DataError(f"preference {number}: preference and description are both empty")
    return Preference(
        dimension=texts["dimension"] or "unnamed",
        subdimension=texts["subdimension"] or "",
        preference=texts["preference"] or texts["description"] or "",
        description=texts["description"] or texts["preference"] or "",
    )


def _rubric(entry: Mapping[str, Any], number: int) -> Rubric:
    """One rubric.

    Anchors stand under `score_descriptions`, as an object by score, a list of five, or null (none at all), or beside
    the criteria as `score1_description` to `score5_description`.
    """
    where = f"rubric {number}"
    criteria = entry.get("criteria")
    if not isinstance(criteria, str) or is_blank(criteria):
        raise DataError(f"{where}: criteria is {_kind(criteria)}, expected text; it has: {_keys(entry)}")
    beside = {key: value for key, value in entry.items() if _score_of(key) is not None}
    # Another scale, which the judge would never hear of.
    if others := [key for key in entry if key not in beside and _ANY_SCORE.fullmatch(str(key).strip())]:
        raise DataError(f"{where}: {shortened(str(others[0]))!r}: expected a score from 1 to 5")
    if "score_descriptions" not in entry and not beside:
        raise DataError(f"{where}: no score_descriptions; it has: {_keys(entry)}")
    anchors = _anchors([*_by_score(entry.get("score_descriptions"), where).items(), *beside.items()], where)
    return Rubric(well_formed(criteria), anchors)


def _by_score(stated: object, where: str) -> Mapping[Any, Any]:
    """What stands under `score_descriptions`, by score."""
    if _is_missing(stated) or isinstance(stated, Mapping):
        return stated if isinstance(stated, Mapping) else {}
    if not isinstance(stated, list | tuple):
        raise DataError(
            f"{where}: score_descriptions is {_kind(stated)}, expected an object by score, or a list of five"
        )
    if stated and len(stated) != len(_SCORES):
        raise DataError(f"{where}: score_descriptions is a list of {len(stated)}, expected one for each of 1 to 5")
    return dict(zip(_SCORES, stated, strict=False))


def _anchors(stated: Sequence[tuple[Any, Any]], where: str) -> dict[str, str]:
    """The descriptions that there are, from "1" to "5"."""
    anchors: dict[str, str] = {}
    for key, value in stated:
        if _is_missing(value) or (isinstance(value, str) and is_blank(value)):
            continue
        score = _score_of(key)
        if score is None or not isinstance(value, str):
            expected = "expected a score from 1 to 5" if score is None else f"is {_kind(value)}, expected text"
            raise DataError(f"{where}: score_descriptions, {shortened(str(key))!r}: {expected}")
        if anchors.setdefault(score, well_formed(value)) != well_formed(value):
            raise DataError(f"{where}: two descriptions of score {score}")
    if anchors and not {_SCORES[0], _SCORES[-1]} <= anchors.keys():
        raise DataError(f"{where}: describes the scores {', '.join(sorted(anchors))}; both ends, 1 and 5, are needed")
    return {score: anchors[score] for score in _SCORES if score in anchors}


def _score_of(key: object) -> str | None:
    """The score that a key of a rubric names: 1, "1", "score1_description", "Score 1"; None where it names none."""
    if isinstance(key, bool) or not isinstance(key, int | str):
        return None
    match = re.fullmatch(r"(?:score[_ ]?)?([1-5])(?:_description)?", str(key).strip(), flags=re.IGNORECASE)
    return match[1] if match else None


def _kind(value: object) -> str:
    """How a message names a value of the wrong type."""
    if _is_missing(value):
        return "null"
    shown = f" ({shortened(repr(value))})" if isinstance(value, bool | float) else ""
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), type(value).__name__) + shown


def _keys(entry: Mapping[str, Any]) -> str:
    return shortened(", ".join(map(str, entry)), 120)


def shortened(text: str, length: int = 60) -> str:
    """The text on one printable line, cut to a length in characters."""
    # Joiners hold emoji and some scripts together.
    kept = (c if c.isprintable() or c in "\u200c\u200d" else " " for c in text[: 4 * length])
    line = " ".join("".join(kept).split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"


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
