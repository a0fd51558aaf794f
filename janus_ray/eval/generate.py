"""Step 1: responses of every model, with each person's system message and without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upath import UPath

from janus_ray.chat import conversation
from janus_ray.eval.bench import siblings
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import Condition, EvaluatedModel, EvaluateRecipe
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.fanout import ask_all
from janus_ray.llm.request import Completion, LLMRequest, Sampling, derived_seed
from janus_ray.records import content_id
from janus_ray.store.files import write_jsonl

GENERATIONS_FILE = "generations.jsonl"
_STATUS_OF_ERRORS = {
    "empty": "empty",
    "truncated": "unfinished",
    "unfinished": "unfinished",
    "refusal": "refusal",
    "content_filter": "refusal",
}


def generate(
    recipe: EvaluateRecipe, policies: Mapping[str, ReachedEndpoint], items: Sequence[BenchItem], folder: UPath
) -> list[dict[str, Any]]:
    """Writes and returns one row per response, also for those that failed.

    The status of a row is ok, truncated (cut at max_tokens; judged as it is), empty (the model answered with nothing;
    judged as an empty text, because for the person that is what the answer was), unfinished (cut before any text, also
    with more room, or never said to be finished), refusal or api_fail. The last three are not judged and count against
    the coverage.

    Args:
        recipe: what to do.
        policies: the endpoint of each model, by the model's name.
        items: the bench.
        folder: where the rows and the ledger go.
    """
    rows: list[dict[str, Any]] = []
    for model in recipe.models:
        due = [(condition, item) for condition in model.conditions for item in _items_for(condition, items)]
        requests = [
            replace(_request(recipe, condition, item), custom_id=str(number))
            for number, (condition, item) in enumerate(due)
        ]
        ledger = folder / "ledger" / "policy"
        answered = ask_all(
            requests, policies[model.name], ledger, recipe.client_actors, f"evaluate: responses of {model.name}"
        )
        outcomes = {int(request.custom_id): outcome for request, outcome in answered}
        rows += [_row(model, *due[number], outcomes[number]) for number in range(len(due))]
    write_jsonl(folder / GENERATIONS_FILE, rows)
    return rows


def _items_for(condition: Condition, items: Sequence[BenchItem]) -> list[BenchItem]:
    """All items; without a system message siblings ask the same, so one of them stands for the prompt."""
    return list(items) if condition == "own_system" else [group[0] for group in siblings(items).values()]


def _request(recipe: EvaluateRecipe, condition: Condition, item: BenchItem) -> LLMRequest:
    sampling = recipe.generation
    return LLMRequest(
        stage=f"evaluate_{condition}",
        messages=tuple(conversation(item.system if condition == "own_system" else None, item.prompt)),
        sampling=Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.repetition_penalty),
        seed=derived_seed(recipe.seed, item.item_id, condition),
        keep_truncated=True,
    )


def _row(model: EvaluatedModel, condition: Condition, item: BenchItem, outcome: Completion) -> dict[str, Any]:
    own = condition == "own_system"
    return {
        "generation_id": content_id(model.name, condition, item.item_id if own else item.prompt_id),
        "model": model.name,
        "condition": condition,
        "split": item.split,
        "prompt_id": item.prompt_id,
        "written_for": item.item_id if own else None,
        "system": item.system if own else None,
        "prompt": item.prompt,
        "response": outcome.text.strip(),
        "status": _status(outcome),
        "error_message": outcome.error_message,
        "prompt_tokens": outcome.usage.prompt_tokens,
        "completion_tokens": outcome.usage.completion_tokens,
    }


def _status(outcome: Completion) -> str:
    if outcome.status == "ok":
        return "truncated" if outcome.finish_reason == "length" else "ok"
    return _STATUS_OF_ERRORS.get(outcome.error_kind or "", "api_fail")
