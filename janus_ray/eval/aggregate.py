"""Step 3: from judgments to numbers. A pure function of the rows of steps 1 and 2.

Vocabulary. A *response* was written for one person (or for none) and is judged under the rubrics of every person who
asked the same prompt, under the conditions of the benchmark. Its *score* for a person is the mean over that person's
rubrics that were scored.

Means are over scores, intervals are cluster-robust by prompt (stats.py; none where there is one prompt only), and a
mean whose coverage (scored rubrics / due ones) is below the threshold is not reported.

Rows are read once and kept as columns of small numbers (columns.py), a few bytes for each judgment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from janus_ray.eval.benchmarks.multifaceted import CONDITIONS, CONTROLS, SCALE
from janus_ray.eval.columns import NOBODY, Columns, Judgments
from janus_ray.eval.results import ConditionScores, Gain, Measure, ModelResults, Protocol, Results, Scores
from janus_ray.eval.rows import Row
from janus_ray.llm.outcome import Status
from janus_ray.records import DIMENSIONS
from janus_ray.stats import mean_with_interval, paired_difference, steering_gain

_USAGE = ("prompt_tokens", "completion_tokens")


def aggregate(
    judgments: Iterable[Row],
    generations: Iterable[Row],
    models: Sequence[str],
    main_model: str,
    threshold: float,
    protocol: Protocol,
) -> Results:
    """All numbers of the report.

    Args:
        judgments: rows of step 2.
        generations: rows of step 1.
        models: names, in the report's order.
        main_model: whose controls and steering gain stand at the top level.
        threshold: coverage below which a mean is withheld.
        protocol: what the numbers come from.
    """
    counted = _Counted()
    judged = Judgments(counted.judgment(row) for row in judgments)
    for row in generations:
        counted.generation(row)
    # The same for every model and condition, whatever was measured of it: tables and plots have one row for each.
    known = judged.dimensions.names
    dimensions = [d for d in DIMENSIONS if d in known] + sorted(set(known) - set(DIMENSIONS), key=str)
    of = {model: _OfModel(judged.of_model(model), judged, dimensions, threshold) for model in models}
    return Results(
        scale=SCALE,
        conditions=CONDITIONS,
        models={model: each.results() for model, each in of.items()},
        main_model=main_model,
        paired_differences={model: each.paired() for model, each in of.items()},
        matrix={model: each.matrix() for model, each in of.items()},
        status_counts={"generations": counted.generations, "judgments": counted.judgments},
        judge_asked_again={model: counted.asked_again[model] for model in models},
        protocol=protocol,
        usage={name: counted.usage[name] for name in _USAGE},
    )


class _Counted:
    """What is counted while rows pass by."""

    def __init__(self) -> None:
        self.generations: dict[str, Counter[Status]] = {}
        self.judgments: dict[str, Counter[Status]] = {}
        self.asked_again: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()

    def generation(self, row: Row) -> None:
        self.generations.setdefault(row["model"], Counter())[Status(row["status"])] += 1
        for name in _USAGE:
            self.usage[name] += row.get(name) or 0

    def judgment(self, row: Row) -> Row:
        self.judgments.setdefault(row["model"], Counter())[Status(row["status"])] += 1
        self.asked_again[row["model"]] += bool(row.get("asked_again"))
        return row


class _OfModel:
    """The numbers of one model, from its columns."""

    def __init__(self, columns: Columns, judged: Judgments, dimensions: Sequence[str], threshold: float) -> None:
        self._all = columns
        self._judged = judged
        self._dimensions = dimensions
        self._threshold = threshold
        self._splits = list(judged.splits.names)

    def results(self) -> ModelResults:
        """Mean scores by condition, split and dimension, and the steering gain."""
        conditions = {
            condition: ConditionScores(
                **self._scores(used),
                per_split={split: Scores(**self._scores(self._of_split(used, split))) for split in self._splits},
            )
            for condition in (each.name for each in CONDITIONS)
            if len((used := self._under(condition)).cells)
        }
        gain = Gain(overall=self._gain(None), per_split={split: self._gain(split) for split in self._splits})
        return ModelResults(conditions=conditions, steering_gain=gain)

    def _under(self, *conditions: str) -> Columns:
        codes = [self._judged.conditions.code(condition) for condition in conditions]
        return self._all.only(np.isin(self._all.cells["condition"], codes))

    def _of_split(self, used: Columns, split: str | None) -> Columns:
        return used if split is None else used.only(used.cells["split"] == self._judged.splits.code(split))

    def _scores(self, used: Columns) -> dict[str, Any]:
        return {
            "overall": self._measure(used, *used.valued()),
            "per_dimension": {dimension: self._of_dimension(used, dimension) for dimension in self._dimensions},
        }

    def _measure(self, used: Columns, values: np.ndarray, prompts: np.ndarray) -> Measure:
        scored, due = used.scored_and_due()
        return Measure.of(mean_with_interval(values, prompts.tolist()), scored, due, self._threshold)

    def _of_dimension(self, used: Columns, dimension: str) -> Measure:
        rubrics = used.of_dimension(self._judged.dimensions.code(dimension))
        values, prompts = rubrics.scores()
        estimate = mean_with_interval(values, prompts.tolist())
        return Measure.of(estimate, *rubrics.scored_and_due(), self._threshold)

    def _gain(self, split: str | None) -> Measure:
        """Mean steering gain over prompts with siblings, with its interval."""
        used = self._of_split(self._all.only(self._all.cells["written_for"] != NOBODY), split)
        gains = [(prompt, steering_gain(matrix)) for prompt, matrix in used.matrices()]
        known = [(prompt, gain) for prompt, gain in gains if gain is not None]
        estimate = mean_with_interval([gain for _, gain in known], [prompt for prompt, _ in known])
        return Measure.of(estimate, *used.scored_and_due(), self._threshold)

    def paired(self) -> dict[str, dict[str, Measure]]:
        """Own minus control for the same person and prompt, overall and per split; siblings' responses are averaged."""
        own = CONDITIONS[0].name
        return {
            f"{own} - {control}": {
                name: self._difference(own, control, split)
                for name, split in (("all", None), *((split, split) for split in self._splits))
            }
            for control in CONTROLS
            if len(self._under(control).cells)
        }

    def _difference(self, own: str, control: str, split: str | None) -> Measure:
        left, right = (self._of_split(self._under(condition), split) for condition in (own, control))
        people, cells = self._judged.people.names, self._all.cells
        prompt_of = zip(cells["judged_for"].tolist(), cells["prompt"].tolist(), strict=True)
        cluster_of: dict[Hashable, Hashable] = {people[person]: prompt for person, prompt in prompt_of}
        by_person: list[dict[Hashable, float]] = [
            {people[person]: float(np.mean(values)) for person, values in side.by_person().items()}
            for side in (left, right)
        ]
        scored, due = self._of_split(self._under(own, control), split).scored_and_due()
        return Measure.of(paired_difference(*by_person, cluster_of), scored, due, self._threshold)

    def matrix(self) -> list[list[float | None]]:
        """The cross-preference matrix averaged over prompts, by the siblings' order in the bench; None where unscored.

        Prompts with another number of siblings than most are left out.
        """
        used = self._all.only(self._all.cells["written_for"] != NOBODY)
        matrices = [matrix for _, matrix in used.matrices()]
        if not matrices:
            return []
        size = Counter(map(len, matrices)).most_common(1)[0][0]
        stacked = np.stack([matrix for matrix in matrices if len(matrix) == size])
        counts = (~np.isnan(stacked)).sum(axis=0)
        sums = np.nansum(stacked, axis=0)
        return [[float(sums[a, b] / counts[a, b]) if counts[a, b] else None for b in range(size)] for a in range(size)]
