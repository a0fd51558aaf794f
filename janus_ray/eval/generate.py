"""Step 1: responses of every model, with each person's system message and without any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from upath import UPath

from janus_ray.eval.bench import siblings
from janus_ray.eval.benchmarks.multifaceted import response_request, responses_due
from janus_ray.eval.items import BenchItem
from janus_ray.eval.outcomes import kept_outcomes
from janus_ray.eval.recipe import HEADLINE, EvaluatedModel, EvaluateRecipe, Generated
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.outcome import status_of
from janus_ray.llm.request import Completion
from janus_ray.records import content_id
from janus_ray.store.files import write_jsonl

GENERATIONS_FILE = "generations.jsonl"


def generate(
    recipe: EvaluateRecipe, policies: Mapping[str, ReachedEndpoint], items: Sequence[BenchItem], folder: UPath
) -> None:
    """Writes one row per response, also for those that failed, in the order of models, conditions and bench.

    Responses that are truncated or empty are judged as they are: an empty one because for the person that is what the
    answer was. The other failures are not judged and count against the coverage.

    Args:
        recipe: what to do.
        policies: the endpoint of each model, by the model's name.
        items: the bench.
        folder: where the rows and the ledger go.
    """
    with ExitStack() as kept:
        answered = [
            (model, _answered(recipe, model, policies[model.name], items, folder, kept)) for model in recipe.models
        ]
        write_jsonl(
            folder / GENERATIONS_FILE, (_row(model, *each) for model, outcomes in answered for each in outcomes)
        )


def _answered(
    recipe: EvaluateRecipe,
    model: EvaluatedModel,
    policy: ReachedEndpoint,
    items: Sequence[BenchItem],
    folder: UPath,
    kept: ExitStack,
) -> Iterator[tuple[Generated, BenchItem, Completion]]:
    """Asks one model for everything that is due; the outcomes, in order, stay on disk for as long as the stack does."""
    due = list(responses_due(model, items, siblings(items)))
    requests = ((number, response_request(recipe, *each)) for number, each in enumerate(due))
    outcomes = kept.enter_context(kept_outcomes(folder))
    label = f"evaluate: responses of {model.name}"
    for _ in outcomes.asked(requests, policy, folder / "ledger" / "policy", recipe.client_actors, label, len(due)):
        pass
    return ((*each, outcomes.of(number)) for number, each in enumerate(due))


def _row(model: EvaluatedModel, condition: Generated, item: BenchItem, outcome: Completion) -> dict[str, Any]:
    own = condition == HEADLINE
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
        "status": status_of(outcome),
        "error_message": outcome.error_message,
        "prompt_tokens": outcome.usage.prompt_tokens,
        "completion_tokens": outcome.usage.completion_tokens,
    }
