"""The miniature's bench: prompts that training never saw, asked by people with seen and unseen values.

    seen                 the very set of four preferences, and its phrasings, are in the collection
    unseen_combination   every preference is, this set of four is not
    unseen_phrasing      a set from the collection, stated in words that are not
    unseen_preference    one preference of the four is in no row of the collection

What was seen is read from the collection itself, not from the world's plan, and checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from janus_ray.errors import DataError
from janus_ray.miniature import gold, teacher
from janus_ray.miniature.recipe import BenchRecipe
from janus_ray.miniature.world import Topic, Wish, held_out_combinations, topics, wish_named, wishes
from janus_ray.records import DIMENSIONS, content_id
from janus_ray.store.files import write_jsonl
from janus_ray.store.tables import read_parquet
from janus_ray.values.value import as_rows

_SIBLINGS = 3

SCORE_DESCRIPTIONS = {
    "1": "Nothing in the response meets the wish.",
    "2": "The wish is met in part, and the response misses the topic.",
    "3": "The wish is met in part, or it is met fully by a response that misses the topic.",
    "4": "The wish is met fully, but the advice does not belong to the topic.",
    "5": "The wish is met fully, by advice that belongs to the topic.",
}

Combination = tuple[Wish, ...]


def build_bench(recipe: BenchRecipe) -> list[dict[str, Any]]:
    """Writes the bench and returns its rows.

    Raises:
        DataError: the collection is missing or too small to draw three siblings that share no value.
    """
    rows = read_parquet(recipe.collection, ["preference_set", "prompt", "status"]).to_pylist()
    seen = sorted({_combination(row) for row in rows if row["status"] == "ok"}, key=_names)
    if not seen:
        raise DataError(f"{recipe.collection}: no row to take seen preferences from")
    pools: dict[str, Callable[[random.Random], Sequence[Combination]]] = {
        "seen": lambda generator: _siblings(seen, generator),
        "unseen_combination": lambda generator: _siblings(_unseen(seen), generator),
        "unseen_phrasing": lambda generator: _siblings(seen, generator),
        "unseen_preference": lambda generator: [_with_held_out(c, generator) for c in _siblings(seen, generator)],
    }
    bench = []
    for split, draw in pools.items():
        generator = random.Random(f"{recipe.seed}|{split}")
        for topic in generator.sample(list(topics().values()), recipe.prompts_per_split):
            prompt = generator.choice(topic.bench_requests).format(topic.name)
            for combination in draw(generator):
                bench.append(_item(split, topic, prompt, combination, generator))
    _check_held_out({row["prompt"] for row in rows}, bench)
    write_jsonl(recipe.output_path, bench)
    print(f"miniature: bench of {len(bench)} items in {len(pools)} splits -> {recipe.output_path}")
    return bench


def rubric_for(wish: Wish, description: str) -> dict[str, Any]:
    """The rubric of one preference. It names the value, so that a judge of this world knows which one is meant."""
    where = f"{wish.dimension} / {wish.subdimension} / {wish.name}"
    return {
        "criteria": f"Does the response meet this person's wish ({where})? The wish: {description}",
        "score_descriptions": SCORE_DESCRIPTIONS,
    }


def _item(split: str, topic: Topic, prompt: str, combination: Combination, generator: random.Random) -> dict[str, Any]:
    unseen = split == "unseen_phrasing"
    stated = {wish: generator.choice(wish.descriptions(unseen=unseen)) for wish in combination}
    system = teacher.system_message(list(stated.values()), generator.randrange(2**31))
    prompt_id = content_id(split, prompt)
    return {
        "source": topic.family,
        "preference_set": as_rows([wish.stated(text) for wish, text in stated.items()]),
        "system": system,
        "prompt": prompt,
        "reference_answer": gold.compose(prompt, {wish.dimension: wish for wish in combination}),
        "rubrics": [rubric_for(wish, text) for wish, text in stated.items()],
        "item_id": content_id(prompt_id, system),
        "prompt_id": prompt_id,
        "split": split,
    }


def _siblings(pool: Sequence[Combination], generator: random.Random) -> list[Combination]:
    """Three combinations that share no value, so that each response is wrong for both siblings."""
    for _ in range(10_000):
        drawn = generator.sample(list(pool), min(_SIBLINGS, len(pool)))
        if len({wish for combination in drawn for wish in combination}) == _SIBLINGS * len(DIMENSIONS):
            return drawn
    raise DataError("the collection is too small for three people who share no preference; collect more rows")


def _unseen(seen: Sequence[Combination]) -> list[Combination]:
    known = {_names(combination) for combination in seen}
    return [combination for combination in held_out_combinations() if _names(combination) not in known]


def _with_held_out(combination: Combination, generator: random.Random) -> Combination:
    """The combination with one of its values replaced by the held-out value of that dimension."""
    position = generator.randrange(len(combination))
    dimension = combination[position].dimension
    held_out = next(wish for wish in wishes()[dimension] if wish.held_out)
    return (*combination[:position], held_out, *combination[position + 1 :])


def _combination(row: dict[str, Any]) -> Combination:
    by_dimension = {p["dimension"]: wish_named()[p["dimension"], p["preference"]] for p in row["preference_set"]}
    return tuple(by_dimension[dimension] for dimension in DIMENSIONS)


def _names(combination: Combination) -> tuple[str, ...]:
    return tuple(wish.name for wish in combination)


def _check_held_out(trained_prompts: set[str], bench: list[dict[str, Any]]) -> None:
    """No bench prompt was trained on: a leak would make every number meaningless."""
    leaked = [row["prompt"] for row in bench if row["prompt"] in trained_prompts]
    assert not leaked, f"bench prompts are in the collection: {leaked[:3]}"
