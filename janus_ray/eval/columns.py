"""Judgments as columns of small numbers: what the aggregate needs of a million rows, without the rows.

A *cell* is one response judged for one person. Names become codes in the order in which they come, so that the first
split of the bench is the first of every table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from janus_ray.eval.benchmarks.multifaceted import condition_of
from janus_ray.eval.rows import Row

# The code of whom a response was written for, where that is nobody.
NOBODY = -1
_CELL = np.dtype([(name, np.int32) for name in ("model", "condition", "split", "prompt", "written_for", "judged_for")])


class Codes:
    """Names and their codes, both ways."""

    def __init__(self) -> None:
        """Knows no name yet."""
        self.names: list[str] = []
        self._codes: dict[str, int] = {}

    def add(self, name: str) -> int:
        """The code of a name, a new one where it is new."""
        code = self._codes.setdefault(name, len(self.names))
        if code == len(self.names):
            self.names.append(name)
        return code

    def code(self, name: str) -> int:
        """The code of a name; one that no row has where it never came."""
        return self._codes.get(name, -2)


class Columns:
    """Some cells and the rubrics under which they were judged.

    Attributes:
        cells: [c] one for each response and person, in the order in which they came.
        rubric_cells: [r] the cell of each rubric, by its place in `cells`.
        rubric_dimensions: [r] its dimension.
        rubric_scores: [r] its score; NaN where unscored.
    """

    def __init__(self, cells: np.ndarray, rubric_cells: np.ndarray, dimensions: np.ndarray, scores: np.ndarray) -> None:
        """Keeps the arrays."""
        self.cells = cells
        self.rubric_cells = rubric_cells
        self.rubric_dimensions = dimensions
        self.rubric_scores = scores

    def only(self, keep: np.ndarray) -> Columns:
        """The cells where a mask [c] is true, with their rubrics."""
        kept = keep[self.rubric_cells]
        places = np.cumsum(keep, dtype=np.int32) - 1
        return Columns(
            self.cells[keep],
            places[self.rubric_cells[kept]],
            self.rubric_dimensions[kept],
            self.rubric_scores[kept],
        )

    def of_dimension(self, code: int) -> Columns:
        """The same cells with the rubrics of one dimension."""
        kept = self.rubric_dimensions == code
        return Columns(self.cells, self.rubric_cells[kept], self.rubric_dimensions[kept], self.rubric_scores[kept])

    def scored_and_due(self) -> tuple[int, int]:
        """Rubric scores that there are, and that there should be."""
        return int(np.count_nonzero(~np.isnan(self.rubric_scores))), len(self.rubric_scores)

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """[s] the scores of rubrics, and [s] the prompt of each."""
        scored = ~np.isnan(self.rubric_scores)
        return self.rubric_scores[scored], self.cells["prompt"][self.rubric_cells[scored]]

    def values(self) -> np.ndarray:
        """[c] the score of each cell: the mean over its scored rubrics, NaN where none was scored."""
        scored = ~np.isnan(self.rubric_scores)
        cells = self.rubric_cells[scored]
        counts = np.bincount(cells, minlength=len(self.cells))
        sums = np.bincount(cells, weights=self.rubric_scores[scored], minlength=len(self.cells))
        return np.divide(sums, counts, out=np.full(len(self.cells), np.nan), where=counts > 0)

    def valued(self) -> tuple[np.ndarray, np.ndarray]:
        """[v] the scores of the cells that have one, and [v] the prompt of each."""
        values = self.values()
        known = ~np.isnan(values)
        return values[known], self.cells["prompt"][known]

    def by_person(self) -> dict[int, list[float]]:
        """The scores of the cells that have one, by whom they are judged for."""
        grouped: dict[int, list[float]] = {}
        for person, value in zip(self.cells["judged_for"].tolist(), self.values().tolist(), strict=True):
            if value == value:
                grouped.setdefault(person, []).append(value)
        return grouped

    def matrices(self) -> Iterator[tuple[int, np.ndarray]]:
        """The cross-preference matrix of each prompt, in the order in which prompts came.

        Yields:
            The prompt, and [k, k]: row, written for; column, judged for; NaN where unscored.
        """
        grouped: dict[int, list[int]] = {}
        for place, prompt in enumerate(self.cells["prompt"].tolist()):
            grouped.setdefault(prompt, []).append(place)
        values = self.values()
        for prompt, places in grouped.items():
            cells = self.cells[places]
            position = {person: index for index, person in enumerate(dict.fromkeys(cells["judged_for"].tolist()))}
            matrix_AB = np.full((len(position), len(position)), np.nan)
            for cell, value in zip(cells, values[places], strict=True):
                if (written_for := int(cell["written_for"])) in position:
                    matrix_AB[position[written_for], position[int(cell["judged_for"])]] = value
            yield prompt, matrix_AB


class Judgments:
    """All judgments of an evaluation, read once."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Reads the rows; their order does not matter, but it decides that of splits, people and prompts."""
        self.models, self.conditions, self.splits = Codes(), Codes(), Codes()
        self.prompts, self.people, self.dimensions = Codes(), Codes(), Codes()
        self._places: dict[tuple[int, int, int, int], int] = {}
        self._cells, self._rubric_cells = array("i"), array("i")
        self._rubric_dimensions, self._rubric_scores = array("i"), array("d")
        for row in rows:
            self._rubric_cells.append(self._place(row))
            self._rubric_dimensions.append(self.dimensions.add(row["dimension"]))
            self._rubric_scores.append(float("nan") if row["score"] is None else row["score"])
        self._places.clear()

    def of_model(self, model: str) -> Columns:
        """The judgments of one model."""
        cells: Any = np.asarray(self._cells).view(_CELL)
        columns = (np.asarray(each) for each in (self._rubric_cells, self._rubric_dimensions, self._rubric_scores))
        return Columns(cells, *columns).only(cells["model"] == self.models.code(model))

    def _place(self, row: Row) -> int:
        """The place of the row's cell, a new one for its first rubric."""
        written_for = row["written_for"]
        prompt, judged_for = self.prompts.add(row["prompt_id"]), self.people.add(row["judged_for"])
        written = NOBODY if written_for is None else self.people.add(written_for)
        key = (self.models.add(row["model"]), written, judged_for, prompt)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self._places)
            condition = self.conditions.add(condition_of(written_for, row["judged_for"]))
            self._cells.extend((key[0], condition, self.splits.add(row["split"]), prompt, written, judged_for))
        return place
