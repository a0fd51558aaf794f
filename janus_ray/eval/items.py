"""One item of a bench: a prompt, one person's values, a rubric for each; and reading it from a row.

Rows are written by many hands: with the published columns or with Prometheus' rubrics, with or without ids. What could
be misread is refused, in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_ray.errors import DataError
from janus_ray.records import content_id, shortened
from janus_ray.text import is_blank, well_formed
from janus_ray.values.value import Value

# What a rubric describes, as the published bench spells it.
_SCORES = ("1", "2", "3", "4", "5")
# Digits of the longest number that is taken for a name.
_LONGEST_NUMBER = 30
_ANY_SCORE = re.compile(r"score[_ ]?\d+(?:[_ ]description)?", flags=re.IGNORECASE)


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
    preference_set: tuple[Value, ...]
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


def _preference(entry: Mapping[str, Any], number: int) -> Value:
    missing = [name for name in Value.model_fields if name not in entry]
    if missing:
        raise DataError(f"preference {number}: missing {', '.join(missing)}; it has: {_keys(entry)}")
    texts = {name: _name(entry[name], f"preference {number}: {name}") for name in Value.model_fields}
    if not texts["preference"] and not texts["description"]:
        raise DataError(f"preference {number}: preference and description are both empty")
    return Value(
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
