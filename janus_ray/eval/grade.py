"""Step 2: every response under every sibling's rubrics, one rubric per judge call."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from upath import UPath

from janus_ray.eval.bench import siblings
from janus_ray.eval.benchmarks.multifaceted import (
    JUDGED,
    asked_for_the_verdict,
    judge_request,
    judged_status,
    judges_for,
    score,
)
from janus_ray.eval.generate import GENERATIONS_FILE
from janus_ray.eval.items import BenchItem
from janus_ray.eval.outcomes import Outcomes, kept_outcomes
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.rows import Row, read_back
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.store.files import write_jsonl

JUDGMENTS_FILE = "judgments.jsonl"
# Beside the scores of a scale, in an array of small numbers.
_UNSCORED, _UNREAD = -128, -127


class _Due(NamedTuple):
    """One judgment that is due."""

    number: int
    generation: Row
    item: BenchItem
    rubric: int

    @property
    def can_be_asked(self) -> bool:
        return self.generation["status"] in JUDGED


def grade(recipe: EvaluateRecipe, judge: ReachedEndpoint, items: Sequence[BenchItem], folder: UPath) -> None:
    """Writes one row per due rubric score, also for those that could not be obtained, in the order of the responses.

    A judge whose answer holds no verdict is asked for it once, with twice the room where the answer was cut. Only rows
    with status ok have a score; the others are unscored, never zero.
    """
    askable = array("b", (each.can_be_asked for each in _due(recipe, items, folder)))
    scores = array("b", [_UNSCORED]) * len(askable)
    with kept_outcomes(folder) as outcomes:

        def ask(requests: Iterator[tuple[int, LLMRequest]], label: str, total: int) -> Iterator[tuple[int, Completion]]:
            return outcomes.asked(requests, judge, folder / "ledger" / "judge", recipe.client_actors, label, total)

        first = ((each.number, _request(recipe, each)) for each in _due(recipe, items, folder) if each.can_be_asked)
        for number, outcome in ask(first, "evaluate: judgments", sum(askable)):
            found = score(outcome)
            scores[number] = found if found is not None else _UNREAD if outcome.status == "ok" else _UNSCORED
        unread = array("b", (each == _UNREAD for each in scores))
        if any(unread):
            again = (
                (each.number, _request_again(recipe, each, outcomes))
                for each in _due(recipe, items, folder)
                if unread[each.number]
            )
            for number, outcome in ask(again, "evaluate: judgments asked for again", sum(unread)):
                found = score(outcome)
                scores[number] = _UNSCORED if found is None else found
        write_jsonl(
            folder / JUDGMENTS_FILE,
            (
                _row(each, outcomes.get(each.number), scores[each.number], asked_again=bool(unread[each.number]))
                for each in _due(recipe, items, folder)
            ),
        )


def _due(recipe: EvaluateRecipe, items: Sequence[BenchItem], folder: UPath) -> Iterator[_Due]:
    """Every judgment that is due, numbered in the order of the responses."""
    grouped = siblings(items)
    number = 0
    for generation in read_back(folder / GENERATIONS_FILE):
        for item, rubric in judges_for(recipe, generation["written_for"], grouped[generation["prompt_id"]]):
            yield _Due(number, generation, item, rubric)
            number += 1


def _request(recipe: EvaluateRecipe, due: _Due) -> LLMRequest:
    return judge_request(recipe, due.item, due.rubric, due.generation["response"])


def _request_again(recipe: EvaluateRecipe, due: _Due, outcomes: Outcomes) -> LLMRequest:
    return asked_for_the_verdict(_request(recipe, due), outcomes.of(due.number))


def _row(due: _Due, outcome: Completion | None, found: int, *, asked_again: bool) -> dict[str, Any]:
    scored = None if found == _UNSCORED else found
    preference = due.item.preference_set[due.rubric]
    return {
        "generation_id": due.generation["generation_id"],
        "model": due.generation["model"],
        "condition": due.generation["condition"],
        "split": due.item.split,
        "prompt_id": due.item.prompt_id,
        "written_for": due.generation["written_for"],
        "judged_for": due.item.item_id,
        "rubric": due.rubric,
        "dimension": preference.dimension,
        "preference": preference.preference,
        "status": judged_status(outcome, scored),
        "score": scored,
        "feedback": outcome.text if outcome else "",
        "error_message": outcome.error_message if outcome else None,
        "asked_again": asked_again,
    }
