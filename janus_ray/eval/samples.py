"""The prompts that the report shows in full: a bounded number of them, whatever the bench holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from janus_ray.eval.bench import siblings
from janus_ray.eval.items import BenchItem
from janus_ray.eval.rows import Row

Scored = dict[int, float | None]


@dataclass(frozen=True, slots=True)
class Person:
    """One person's values and what the model answered."""

    item: BenchItem
    response: Row | None
    own: Scored
    """Scores for the person itself, by rubric."""
    others: tuple[float | None, ...]
    """Mean scores of the same response for the others."""

    @property
    def mean(self) -> float | None:
        """Mean over the scored rubrics."""
        return _mean(self.own)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with everybody who asked it."""

    prompt: str
    split: str
    people: tuple[Person, ...]


def collected_samples(
    model: str, items: Sequence[BenchItem], generations: Iterable[Row], judgments: Iterable[Row], number: int
) -> list[Sample]:
    """Prompts with every person's values and response side by side, taken in turn from the splits.

    Args:
        model: whose responses.
        items: the bench.
        generations: rows of step 1; they pass by, and only those of the samples are kept.
        judgments: rows of step 2, likewise.
        number: how many prompts.
    """
    groups = _chosen(items, number)
    wanted = {item.item_id for group in groups for item in group}
    responses = {
        row["written_for"]: row for row in generations if row["model"] == model and row["written_for"] in wanted
    }
    scores: dict[tuple[str, str], Scored] = {}
    for row in judgments:
        if row["model"] == model and row["written_for"] in wanted:
            scores.setdefault((row["written_for"], row["judged_for"]), {})[row["rubric"]] = row["score"]

    def person(item: BenchItem, group: Sequence[BenchItem]) -> Person:
        others = tuple(_mean(scores.get((item.item_id, other.item_id), {})) for other in group if other is not item)
        return Person(item, responses.get(item.item_id), scores.get((item.item_id, item.item_id), {}), others)

    return [Sample(group[0].prompt, group[0].split, tuple(person(item, group) for item in group)) for group in groups]


def _chosen(items: Sequence[BenchItem], number: int) -> list[list[BenchItem]]:
    by_split: dict[str, list[list[BenchItem]]] = {}
    for group in siblings(items).values():
        by_split.setdefault(group[0].split, []).append(group)
    rounds = (group for turn in range(number) for groups in by_split.values() for group in groups[turn : turn + 1])
    return [group for group, _ in zip(rounds, range(number), strict=False)]


def _mean(scores: Scored) -> float | None:
    scored = [score for score in scores.values() if score is not None]
    return sum(scored) / len(scored) if scored else None
