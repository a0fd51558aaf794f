"""Step 2: every response under every sibling's rubrics, one rubric per judge call.

Prometheus-style absolute grading (Kim et al. 2024, arXiv 2405.01535), as in the paper: the judge sees the request,
the response, the reference answer and one rubric, and not the system message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from upath import UPath

from janus_ray.eval.bench import siblings
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.verdict import parse_verdict
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.fanout import ask_all
from janus_ray.llm.request import Completion, LLMRequest, Sampling
from janus_ray.prompts import prompt_sha256, render
from janus_ray.store.files import write_jsonl

JUDGMENTS_FILE = "judgments.jsonl"
# The endpoint did its part, but what came is no answer: cut before any text, thoughts only, nothing.
_NO_ANSWER = frozenset({"truncated", "empty", "unfinished"})
JUDGED_STATUSES = frozenset({"ok", "truncated", "empty"})


def grade(
    recipe: EvaluateRecipe,
    judge: ReachedEndpoint,
    items: Sequence[BenchItem],
    generations: Sequence[dict[str, Any]],
    folder: UPath,
) -> list[dict[str, Any]]:
    """Writes and returns one row per due rubric score, also for those that could not be obtained.

    A judge whose answer holds no verdict is asked for it once, with twice the room where the answer was cut. The status
    of a row is ok, parse_fail (no readable verdict, also then), api_fail, or no_response (nothing to judge). Only ok
    rows have a score; the others are unscored, never zero.
    """
    grouped = siblings(items)
    due = [
        (generation, item, index)
        for generation in generations
        for item in grouped[generation["prompt_id"]]
        if recipe.judge_siblings or generation["written_for"] in (None, item.item_id)
        for index in range(len(item.rubrics))
    ]
    askable = [number for number, (generation, _, _) in enumerate(due) if generation["status"] in JUDGED_STATUSES]
    requests = {number: _request(recipe, *due[number]) for number in askable}
    outcomes = _ask(recipe, judge, requests, folder, "evaluate: judgments")
    unread = {
        number: _asked_for_the_verdict(requests[number], outcome)
        for number, outcome in outcomes.items()
        if outcome.status == "ok" and _score(outcome) is None
    }
    if unread:
        outcomes |= _ask(recipe, judge, unread, folder, "evaluate: judgments asked for again")
    rows = [
        {**_row(*observation, outcomes.get(number)), "asked_again": number in unread}
        for number, observation in enumerate(due)
    ]
    write_jsonl(folder / JUDGMENTS_FILE, rows)
    return rows


def _ask(
    recipe: EvaluateRecipe, judge: ReachedEndpoint, requests: dict[int, LLMRequest], folder: UPath, label: str
) -> dict[int, Completion]:
    ledger = folder / "ledger" / "judge"
    numbered = [replace(request, custom_id=str(number)) for number, request in requests.items()]
    answered = ask_all(numbered, judge, ledger, recipe.client_actors, label)
    return {int(request.custom_id): outcome for request, outcome in answered}


def _request(recipe: EvaluateRecipe, generation: dict[str, Any], item: BenchItem, index: int) -> LLMRequest:
    rubric = item.rubrics[index]
    text = render(
        "judge_absolute",
        prompt=item.prompt,
        response=generation["response"],
        reference_answer=item.reference_answer,
        criteria=rubric.criteria,
        score_descriptions=sorted(rubric.score_descriptions.items()),
    )
    return LLMRequest(
        stage="judge",
        messages=({"role": "user", "content": text},),
        sampling=Sampling(temperature=recipe.judging.temperature, max_tokens=recipe.judging.max_tokens),
        prompt_sha256=prompt_sha256("judge_absolute"),
        seed=recipe.seed,
        # A long-winded judge has often said its score; if not, it is asked for it.
        keep_truncated=True,
    )


def _score(outcome: Completion) -> int | None:
    """The score of an answer; of one that was cut, not where it stands in the line that might have gone on."""
    if outcome.status != "ok":
        return None
    score = parse_verdict(outcome.text)
    whole_lines = outcome.text[: outcome.text.rfind("\n") + 1]
    return None if outcome.finish_reason == "length" and parse_verdict(whole_lines) != score else score


def _asked_for_the_verdict(request: LLMRequest, outcome: Completion) -> LLMRequest:
    """The request continued by the judge's answer: a judge at temperature 0 would only repeat itself otherwise."""
    more = ({"role": "assistant", "content": outcome.text}, {"role": "user", "content": render("judge_verdict")})
    sampling = request.sampling
    if outcome.finish_reason == "length" and sampling.max_tokens:
        sampling = replace(sampling, max_tokens=2 * sampling.max_tokens)
    return replace(
        request, messages=request.messages + more, sampling=sampling, prompt_sha256=prompt_sha256("judge_verdict")
    )


def _row(generation: dict[str, Any], item: BenchItem, index: int, outcome: Completion | None) -> dict[str, Any]:
    score = _score(outcome) if outcome else None
    if outcome is None:
        status = "no_response"
    elif outcome.status == "error" and outcome.error_kind not in _NO_ANSWER:
        status = "api_fail"
    else:
        status = "ok" if score is not None else "parse_fail"
    return {
        "generation_id": generation["generation_id"],
        "model": generation["model"],
        "condition": generation["condition"],
        "split": item.split,
        "prompt_id": item.prompt_id,
        "written_for": generation["written_for"],
        "judged_for": item.item_id,
        "rubric": index,
        "dimension": item.preference_set[index].dimension,
        "preference": item.preference_set[index].preference,
        "status": status,
        "score": score,
        "feedback": outcome.text if outcome else "",
        "error_message": outcome.error_message if outcome else None,
    }
