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

from janus_ray.records import DIMENSIONS, content_id
from janus_ray.values.value import Value

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Wish:
    """A value of this world before anybody states it: every way to say it, and how the teacher realises it."""

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

    def stated(self, description: str) -> Value:
        """The value of a person who says it in these words."""
        return Value(
            dimension=self.dimension, subdimension=self.subdimension, preference=self.name, description=description
        )


@dataclass(frozen=True, slots=True)
class Topic:
    """Something people ask about, with three tips."""

    family: str
    name: str
    tips: tuple[str, str, str]
    requests: tuple[str, ...]
    bench_requests: tuple[str, ...]


@cache
def wishes() -> dict[str, list[Wish]]:
    """All values by dimension, held-out ones last."""
    raw = tomllib.loads((_FOLDER / "preferences.toml").read_text())
    return {
        dimension: [
            Wish(
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
def wish_named() -> dict[tuple[str, str], Wish]:
    """Values by (dimension, name)."""
    return {(wish.dimension, wish.name): wish for group in wishes().values() for wish in group}


def instructions() -> list[dict[str, str]]:
    """The instructions for collecting, one row each, with the family as their source."""
    return [
        {"id": content_id(topic.name, request), "family": topic.family, "instruction": request.format(topic.name)}
        for topic in topics().values()
        for request in topic.requests
    ]


def is_held_out_combination(combination: Sequence[Wish]) -> bool:
    """Whether a set of four values is kept from training: a fixed quarter of all sets, by hash."""
    names = "|".join(sorted(f"{wish.dimension}:{wish.name}" for wish in combination))
    return hashlib.sha256(names.encode()).digest()[0] < 64


@cache
def training_combinations() -> list[tuple[Wish, ...]]:
    """Every set of four values that may be trained on."""
    return [combination for combination in _all_combinations() if not is_held_out_combination(combination)]


@cache
def held_out_combinations() -> list[tuple[Wish, ...]]:
    """Every set of four trained values whose combination is not trained on."""
    return [combination for combination in _all_combinations() if is_held_out_combination(combination)]


def _all_combinations() -> list[tuple[Wish, ...]]:
    trained = [[wish for wish in wishes()[dimension] if not wish.held_out] for dimension in DIMENSIONS]
    return list(itertools.product(*trained))
