"""Step 3: from judgments to numbers. A pure function of the two files of steps 1 and 2 and of the bench.

Vocabulary. A *response* was written for one person (or for none) and is judged under the rubrics of every person who
asked the same prompt. Its *score* for a person is the mean over that person's rubrics that were scored. Conditions:

    own_system      judged for the person it was written for: the diagonal of the cross-preference matrix
    sibling_system  judged for another person who asked the same prompt: off the diagonal
    no_system       written for nobody, judged for each person

Means are over scores, intervals are cluster-robust by prompt (stats.py; none where there is one prompt only), and a
mean whose coverage (scored rubrics / due ones) is below the threshold is not reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from janus_ray.records import DIMENSIONS
from janus_ray.stats import Estimate, mean_with_interval, paired_difference, steering_gain

Row = dict[str, Any]
CONDITIONS = ("own_system", "no_system", "sibling_system")


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one response for one person, with what it is made of."""

    condition: str
    split: str
    prompt_id: str
    written_for: str | None
    judged_for: str
    by_dimension: dict[str, list[int]]
    due: dict[str, int]

    @property
    def value(self) -> float | None:
        """Mean over the scored rubrics; None when none was scored."""
        scores = [score for group in self.by_dimension.values() for score in group]
        return float(np.mean(scores)) if scores else None


def aggregate(
    judgments: Sequence[Row], generations: Sequence[Row], models: Sequence[str], main_model: str, threshold: float
) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        judgments: rows of step 2.
        generations: rows of step 1.
        models: names, in the report's order.
        main_model: whose controls and steering gain stand at the top level.
        threshold: coverage below which a mean is withheld.
    """
    by_model = {model: _scores([row for row in judgments if row["model"] == model]) for model in models}
    # The same for every model and condition, whatever was measured of it: tables and plots have one row for each.
    splits = list(dict.fromkeys(row["split"] for row in judgments))
    present = {row["dimension"] for row in judgments}
    dimensions = [d for d in DIMENSIONS if d in present] + sorted(present - set(DIMENSIONS), key=str)
    results: dict[str, Any] = {"models": {}}
    for model, scores in by_model.items():
        summary = {
            condition: _condition(of_condition, splits, dimensions, threshold)
            for condition in CONDITIONS
            if (of_condition := [score for score in scores if score.condition == condition])
        }
        results["models"][model] = {**summary, "steering_gain": _steering_gain(scores, splits, threshold)}
    main = results["models"][main_model]
    results["main_model"] = main_model
    results["controls"] = {name: main[name] for name in ("no_system", "sibling_system") if name in main}
    results["steering_gain"] = main["steering_gain"]
    results["paired_differences"] = {model: _paired(scores, splits, threshold) for model, scores in by_model.items()}
    results["matrix"] = {model: _mean_matrix(scores) for model, scores in by_model.items()}
    results["status_counts"] = {
        "generations": _status_counts(generations),
        "judgments": _status_counts(judgments),
    }
    asked_again = Counter(row["model"] for row in judgments if row.get("asked_again"))
    results["judge_asked_again"] = {model: asked_again[model] for model in models}
    return results


def _scores(judgments: Sequence[Row]) -> list[Score]:
    """Groups rubric rows into one score per response and person."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in judgments:
        grouped.setdefault((row["generation_id"], row["judged_for"]), []).append(row)
    scores = []
    for rows in grouped.values():
        first = rows[0]
        by_dimension: dict[str, list[int]] = {}
        for row in rows:
            if row["score"] is not None:
                by_dimension.setdefault(row["dimension"], []).append(row["score"])
        scores.append(
            Score(
                condition=_condition_of(first),
                split=first["split"],
                prompt_id=first["prompt_id"],
                written_for=first["written_for"],
                judged_for=first["judged_for"],
                by_dimension=by_dimension,
                due=dict(Counter(row["dimension"] for row in rows)),
            )
        )
    return scores


def _condition_of(row: Row) -> str:
    if row["written_for"] is None:
        return "no_system"
    return "own_system" if row["written_for"] == row["judged_for"] else "sibling_system"


def _condition(
    scores: Sequence[Score], splits: Sequence[str], dimensions: Sequence[str], threshold: float
) -> dict[str, Any]:
    def of(used: Sequence[Score]) -> dict[str, Any]:
        return {
            "overall": _overall(used, threshold),
            "per_dimension": {dimension: _dimension(used, dimension, threshold) for dimension in dimensions},
        }

    return {**of(scores), "per_split": {split: of([s for s in scores if s.split == split]) for split in splits}}


def _overall(scores: Sequence[Score], threshold: float) -> dict[str, Any]:
    valued = [(score.value, score.prompt_id) for score in scores if score.value is not None]
    estimate = mean_with_interval([value for value, _ in valued], [prompt for _, prompt in valued])
    return _reported(estimate, *_scored_and_due(scores), threshold)


def _dimension(scores: Sequence[Score], dimension: str, threshold: float) -> dict[str, Any]:
    values = [(value, score.prompt_id) for score in scores for value in score.by_dimension.get(dimension, [])]
    estimate = mean_with_interval([value for value, _ in values], [prompt for _, prompt in values])
    due = sum(score.due.get(dimension, 0) for score in scores)
    return _reported(estimate, len(values), due, threshold)


def _scored_and_due(scores: Iterable[Score]) -> tuple[int, int]:
    """Rubric scores that there are, and that there should be."""
    scores = list(scores)
    scored = sum(len(group) for score in scores for group in score.by_dimension.values())
    return scored, sum(sum(score.due.values()) for score in scores)


def _reported(estimate: Estimate, scored: int, due: int, threshold: float) -> dict[str, Any]:
    """An estimate with its coverage; below the threshold the mean is withheld and the reason given."""
    coverage = scored / due if due else 0.0
    entry = {**asdict(estimate), "coverage": coverage, "scored": scored, "due": due}
    if not due:
        return {**entry, "withheld": "not measured"}
    if coverage < threshold:
        withheld = f"coverage {100 * coverage:.1f} % is below {100 * threshold:.0f} %"
        return {**entry, "mean": None, "low": None, "high": None, "withheld": withheld}
    if estimate.clusters == 1:
        entry["no_interval"] = "one prompt, no interval"
    return entry


def _by_prompt(scores: Iterable[Score]) -> dict[str, list[Score]]:
    grouped: dict[str, list[Score]] = {}
    for score in scores:
        if score.condition != "no_system":
            grouped.setdefault(score.prompt_id, []).append(score)
    return grouped


def matrix_of(scores: Sequence[Score]) -> np.ndarray:
    """[k, k] cross-preference matrix of one prompt: row, written for; column, judged for; NaN where unscored."""
    people = list(dict.fromkeys(score.judged_for for score in scores))
    matrix_AB = np.full((len(people), len(people)), np.nan)
    for score in scores:
        if score.value is not None and score.written_for in people:
            matrix_AB[people.index(score.written_for), people.index(score.judged_for)] = score.value
    return matrix_AB


def _steering_gain(scores: Sequence[Score], splits: Sequence[str], threshold: float) -> dict[str, Any]:
    """Mean steering gain over prompts with siblings, with its interval, overall and per split."""

    def of(split: str | None) -> dict[str, Any]:
        used = [score for score in scores if score.condition != "no_system" and split in (None, score.split)]
        gains = {prompt: steering_gain(matrix_of(group)) for prompt, group in _by_prompt(used).items()}
        known = {prompt: gain for prompt, gain in gains.items() if gain is not None}
        return _reported(mean_with_interval(list(known.values()), list(known)), *_scored_and_due(used), threshold)

    return {"overall": of(None), "per_split": {split: of(split) for split in splits}}


def _paired(scores: Sequence[Score], splits: Sequence[str], threshold: float) -> dict[str, Any]:
    """Own minus control for the same person and prompt, overall and per split; siblings' responses are averaged."""
    cluster_of: dict[Hashable, Hashable] = {score.judged_for: score.prompt_id for score in scores}

    def of(control: str, split: str) -> dict[str, Any]:
        used = [s for s in scores if s.condition in ("own_system", control) and split in ("all", s.split)]
        estimate = paired_difference(_mean_by_person(used, "own_system"), _mean_by_person(used, control), cluster_of)
        return _reported(estimate, *_scored_and_due(used), threshold)

    return {
        f"own_system - {control}": {split: of(control, split) for split in ("all", *splits)}
        for control in ("sibling_system", "no_system")
        if any(score.condition == control for score in scores)
    }


def _mean_by_person(scores: Sequence[Score], condition: str) -> dict[Hashable, float]:
    values: dict[Hashable, list[float]] = {}
    for score in scores:
        if score.condition == condition and score.value is not None:
            values.setdefault(score.judged_for, []).append(score.value)
    return {person: float(np.mean(group)) for person, group in values.items()}


def _mean_matrix(scores: Sequence[Score]) -> list[list[float | None]]:
    """The cross-preference matrix averaged over prompts, by the siblings' order in the bench; None where unscored.

    Prompts with another number of siblings than most are left out.
    """
    matrices = [matrix_of(group) for group in _by_prompt(scores).values()]
    if not matrices:
        return []
    size = Counter(len(matrix) for matrix in matrices).most_common(1)[0][0]
    stacked = np.stack([matrix for matrix in matrices if len(matrix) == size])
    counts = (~np.isnan(stacked)).sum(axis=0)
    sums = np.nansum(stacked, axis=0)
    return [[float(sums[a, b] / counts[a, b]) if counts[a, b] else None for b in range(size)] for a in range(size)]


def _status_counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["model"], Counter())[row["status"]] += 1
    return {model: dict(counter) for model, counter in counts.items()}
