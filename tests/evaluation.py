"""A small evaluation whose numbers are known: an obedient policy, a strict judge, and the recipe that asks them."""

from __future__ import annotations

import re
from pathlib import Path

from upath import UPath

from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.store.files import write_jsonl
from tests.loopback import Reply, chat_reply
from tests.unit.eval.test_bench import row

PEOPLE, PROMPTS, RUBRICS = 3, 4, 2


def recipe_for(folder: Path | UPath, policy: str, judge: str, **changes) -> EvaluateRecipe:
    rubric = row()["rubrics"][0]
    rows = [
        row(
            prompt=f"Question {prompt}?",
            system=f"You serve person {person}.",
            preference_set=row()["preference_set"][:RUBRICS],
            rubrics=[{**rubric, "criteria": f"Is it for person {person}?"}] * RUBRICS,
            split="seen" if prompt % 2 else "unseen",
        )
        for prompt in range(PROMPTS)
        for person in range(PEOPLE)
    ]
    write_jsonl(folder / "bench.jsonl", rows)
    return EvaluateRecipe.model_validate(
        {
            "bench": str(folder / "bench.jsonl"),
            "output_dir": str(folder / "out"),
            "main_model": "m",
            "client_actors": 1,
            "models": [{"name": "m", "model": "m"}],
            "policy": {"base_url": policy, "max_concurrency": 8, "max_attempts": 2},
            "judge": {"base_url": judge, "model": "m", "max_concurrency": 8, "max_attempts": 2},
            **changes,
        }
    )


def obedient(n, body):
    """A policy that does as its system message says."""
    first = body["messages"][0]
    person = first["content"].removeprefix("You serve ") if first["role"] == "system" else "nobody."
    return chat_reply(f"This is for {person}")


def strict(n, body):
    """A judge that gives 5 to what names the rubric's person and 2 to everything else."""
    text = body["messages"][0]["content"]
    response = re.search(r"### Response\n(.*)\n", text)[1]
    criterion = re.search(r"Is it for (person \d)\?", text)[1]
    return chat_reply(f"Feedback: so. [RESULT] {5 if criterion in response else 2}")


def models_with(weights_id):
    return Reply({"object": "list", "data": [{"id": "m", "object": "model", "weights_id": weights_id}]})
