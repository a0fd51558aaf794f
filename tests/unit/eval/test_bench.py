from __future__ import annotations

import json

import pytest

from janus_ray.config import load_recipe
from janus_ray.errors import ConfigError, DataError
from janus_ray.eval.bench import load_bench, siblings
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.records import DIMENSIONS
from janus_ray.store.files import write_jsonl


def row(prompt="How?", system="Be brief.", **more):
    """One row of the published bench, which has none of our ids."""
    preferences = [
        {"dimension": dimension, "subdimension": "s", "preference": "p", "description": "d"} for dimension in DIMENSIONS
    ]
    rubric = {"criteria": "Is it?", "score_descriptions": {str(score): f"level {score}" for score in range(1, 6)}}
    published = {
        "source": "alpaca_eval",
        "preference_set": preferences,
        "system": system,
        "prompt": prompt,
        "reference_answer": "So.",
        "rubrics": [rubric] * 4,
    }
    return {**published, **more}


def test_rows_without_our_ids_get_ids_from_their_content(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [row(), row(system="Be long."), row(prompt="Why?")])
    items = load_bench(str(tmp_path / "b.jsonl"))
    assert len({item.item_id for item in items}) == 3
    assert [len(group) for group in siblings(items).values()] == [2, 1]
    assert {item.split for item in items} == {"all"}


def test_a_limit_takes_whole_prompts_of_each_split(tmp_path):
    rows = [row(prompt=f"{n}", system=f"{s}", split=split) for split in "xy" for n in range(3) for s in range(2)]
    write_jsonl(tmp_path / "b.jsonl", rows)
    items = load_bench(str(tmp_path / "b.jsonl"), max_prompts_per_split=2)
    assert [(item.split, item.prompt) for item in items] == [(s, n) for s in "xy" for n in "01" for _ in range(2)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "How?"}], "row 0: no column 'preference_set'; it has: prompt"),
        ([row(), row(rubrics=[])], "row 1: 0 rubrics for 4 preferences"),
        ([row(preference_set=[{"dimension": "style"}])], "row 0: .*missing 3 required"),
        ([], "holds no item"),
    ],
)
def test_bad_benches_are_refused_with_the_row(tmp_path, rows, message):
    write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(DataError, match=message):
        load_bench(str(tmp_path / "b.jsonl"))


def recipe_file(tmp_path, main_model="m", **more):
    lines = {
        "bench": "b.jsonl",
        "output_dir": "out",
        "main_model": main_model,
        "policy": {"base_url": "http://127.0.0.1:1/v1"},
        "judge": {"base_url": "http://127.0.0.1:1/v1", "model": "j"},
        "models": [{"name": "m", "model": "m"}],
        **more,
    }
    return [f"{key}={_toml(value)}" for key, value in lines.items()]


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"main_model": "x"}, "main_model: 'x' is none of m"),
        ({"models": [{"name": "m", "model": "m"}] * 2}, "two have the same name"),
        (
            {"models": [{"name": "m", "model": "m", "conditions": ["no_system"]}]},
            "needs own_system among its conditions",
        ),
        ({"policy": {"base_url": "http://h/v1", "model": "m"}}, r"policy.model: name the evaluated models under"),
        ({"judging": {"tempreture": 1}}, r"judging.tempreture: unknown key; allowed: temperature, max_tokens"),
    ],
)
def test_recipes_that_cannot_mean_anything_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(EvaluateRecipe, [], recipe_file(tmp_path, **changes))
