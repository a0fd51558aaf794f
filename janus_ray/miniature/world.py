"""The closed world: its values, its topics, and what of them training never sees.

Held out by design:

    combinations  a quarter of all sets of four preferences, chosen by hash (`is_held_out_combination`)
    phrasings     each preference's `unseen_phrases`
    preferences   one per dimension (`held_out`)
    requests      the last wording of each family, for all splits, so that no bench prompt was trained on
"""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from janus_ray.records import DIMENSIONS, Preference, content_id

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Value:
    """A preference of this world, with every way to say it."""

    dimension: str
    subdimension: str
    name: str
    phrases: tuple[str, ...]
    unseen_phrases: tuple[str, ...]
    gold: str
    held_out: bool
    frames: tuple[str, ...]

    def descriptions(self, *, unseen: bool = False) -> list[str]:
        """Every sentence that states this value: its phrases in the frames of the dimension."""
        phrases = self.unseen_phrases if unseen else self.phrases
        return [frame.format(phrase) for phrase in phrases for frame in self.frames]

    def as_preference(self, description: str) -> Preference:
        """The record that crosses a stage border."""
        return Preference(self.dimension, self.subdimension, self.name, description)


@dataclass(frozen=True, slots=True)
class Topic:
    """Something people ask about, with three tips."""

    family: str
    name: str
    tips: tuple[str, str, str]
    requests: tuple[str, ...]
    bench_requests: tuple[str, ...]


@cache
def values() -> dict[str, list[Value]]:
    """All values by dimension, held-out ones last."""
    raw = tomllib.loads((_FOLDER / "preferences.toml").read_text())
    return {
        dimension: [
            Value(
                dimension=dimension,
                subdimension=entry["subdimension"],
                name=entry["name"],
                phrases=tuple(entry["phrases"]),
                unseen_phrases=tuple(entry["unseen_phrases"]),
                gold=entry["gold"],
                held_out=entry.get("held_out", False),
                frames=tuple(raw[dimension]["frames"]),
            )
            for entry in raw[dimension]["preference"]
        ]
        for dimension in DIMENSIONS
    }


@cache
def topics() -> dict[str, Topic]:
    """All topics by name."""
    raw = tomllib.loads((_FOLDER / "topics.toml").read_text())
    return {
        name: Topic(family, name, tuple(tips), tuple(entry["requests"]), tuple(entry["bench_requests"]))
        for family, entry in raw.items()
        for name, tips in entry["topics"].items()
    }


@cache
def value_named() -> dict[tuple[str, str], Value]:
    """Values by (dimension, name)."""
    return {(value.dimension, value.name): value for group in values().values() for value in group}


def instructions() -> list[dict[str, str]]:
    """The instructions for collecting, one row each, with the family as their source."""
    return [
        {"id": content_id(topic.name, request), "family": topic.family, "instruction": request.format(topic.name)}
        for topic in topics().values()
        for request in topic.requests
    ]


def is_held_out_combination(combination: Sequence[Value]) -> bool:
    """Whether a set of four values is kept from training: a fixed quarter of all sets, by hash."""
    names = "|".join(sorted(f"{value.dimension}:{value.name}" for value in combination))
    return hashlib.sha256(names.encode()).digest()[0] < 64


@cache
def training_combinations() -> list[tuple[Value, ...]]:
    """Every set of four values that may be trained on."""
    return [combination for combination in _all_combinations() if not is_held_out_combination(combination)]


@cache
def held_out_combinations() -> list[tuple[Value, ...]]:
    """Every set of four trained values whose combination is not trained on."""
    return [combination for combination in _all_combinations() if is_held_out_combination(combination)]


def _all_combinations() -> list[tuple[Value, ...]]:
    trained = [[value for value in values()[dimension] if not value.held_out] for dimension in DIMENSIONS]
    return list(itertools.product(*trained))
