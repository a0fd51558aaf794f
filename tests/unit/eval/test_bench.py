from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.config import load_recipe
from janus_ray.errors import ConfigError, DataError
from janus_ray.eval.bench import load_bench, siblings
from janus_ray.eval.items import BenchItem
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.prompts import render
from janus_ray.records import BENCH, DIMENSIONS
from janus_ray.store.files import write_jsonl
from janus_ray.store.fingerprint import fingerprint
from janus_ray.text import is_blank, well_formed
from tests.hub import Repository, reached


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
    pa.Table.from_pylist([row(item_id="1", prompt_id="2", split="s")], schema=BENCH)


def test_a_limit_takes_whole_prompts_of_each_split(tmp_path):
    rows = [row(prompt=f"{n}", system=f"{s}", split=split) for split in "xy" for n in range(3) for s in range(2)]
    write_jsonl(tmp_path / "b.jsonl", rows)
    items = load_bench(str(tmp_path / "b.jsonl"), max_prompts_per_split=2)
    assert [(item.split, item.prompt) for item in items] == [(s, n) for s in "xy" for n in "01" for _ in range(2)]


def preference(**more):
    return {"dimension": "style", "subdimension": "s", "preference": "p", "description": "d", **more}


def rubric(anchors=None, **more):
    return {"criteria": "Is it?", "score_descriptions": anchors, **more}


FIVE = {str(score): f"level {score}" for score in range(1, 6)}


def one(**changes):
    """A row with one preference and one rubric."""
    return row(**{"preference_set": [preference()], "rubrics": [rubric(FIVE)], **changes})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "How?"}], "line 1: no column 'preference_set'; it has: prompt"),
        ([row(), row(rubrics=[])], "line 2: 0 rubrics for 4 preferences"),
        (
            [one(preference_set=[{"dimension": "style"}])],
            "line 1: preference 1: missing subdimension, preference, desc",
        ),
        ([one(preference_set=None)], "line 1: 1 rubrics for 0 preferences"),
        ([one(preference_set=[], rubrics=[])], "line 1: has no preferences and no rubrics"),
        ([one(preference_set=None, rubrics=None)], "line 1: has no preferences and no rubrics"),
        ([one(preference_set="style")], "line 1: preference_set is text, expected a list"),
        ([one(preference_set=["style"])], "line 1: preference_set, entry 1 is text, expected an object"),
        ([one(preference_set=[preference(preference=None, description="")])], "preference 1: .* are both empty"),
        ([one(prompt=None)], "line 1: prompt is null, expected text"),
        ([one(prompt=" \n")], "line 1: prompt is empty"),
        ([one(prompt=["How?", "Why?"])], "line 1: prompt is a list, expected text"),
        ([one(system=None)], "line 1: system is null"),
        ([one(reference_answer=5)], "line 1: reference_answer is int, expected text"),
        ([one(item_id=True)], r"line 1: item_id is bool \(True\), expected text or a number"),
        ([one(split=["x"])], "line 1: split is a list"),
        ([one(item_id=10**40)], "line 1: item_id is int"),
        ([one(rubric=[rubric(FIVE)])], "line 1: has both rubric and rubrics"),
        ([one(rubrics=["Is it?"])], "line 1: rubrics, entry 1 is text"),
        (
            [one(rubrics=[{"score_descriptions": FIVE}])],
            "rubric 1: criteria is null, expected text; it has: score_desc",
        ),
        (
            [one(rubrics=[{"criteria": "Is it?", "levels": FIVE}])],
            "rubric 1: no score_descriptions; it has: criteria, l",
        ),
        ([one(rubrics=[rubric("1 to 5")])], "rubric 1: score_descriptions is text"),
        ([one(rubrics=[rubric(["bad", "good"])])], "rubric 1: score_descriptions is a list of 2"),
        ([one(rubrics=[rubric({"1": "bad", "3": "good"})])], "rubric 1: describes the scores 1, 3; both ends"),
        (
            [one(rubrics=[rubric({**FIVE, "0": "none"})])],
            "rubric 1: score_descriptions, '0': expected a score from 1 to 5",
        ),
        ([one(rubrics=[rubric({**FIVE, "6": "best"})])], "rubric 1: score_descriptions, '6'"),
        ([one(rubrics=[rubric(FIVE, score0_description="none")])], "rubric 1: 'score0_description': expected a score"),
        ([one(rubrics=[rubric(None, score10_description="best")])], "rubric 1: 'score10_description'"),
        ([one(prompt="\u200b")], "line 1: prompt is empty"),
        ([one(rubrics=[rubric(FIVE, criteria="\u200b")])], "rubric 1: criteria"),
        ([one(rubrics=[rubric({**FIVE, "2": 2})])], "rubric 1: score_descriptions, '2': is int, expected text"),
        ([one(rubrics=[rubric(FIVE, score3_description="other")])], "rubric 1: two descriptions of score 3"),
        # Two rows that the numbers would take for one person, or for siblings.
        ([one(), row(prompt="Why?"), one()], "line 1 and line 3 are the same"),
        ([one(item_id="a"), one(item_id="a", prompt="Why?")], "line 1 and line 2 have the same item_id 'a'"),
        ([one(item_id=81), one(item_id="81", system="Be long.")], "line 1 and line 2 have the same item_id '81'"),
        ([one(), one(rubrics=[rubric(None)])], "line 1 and line 2 have the same item_id"),
        ([one(prompt_id="p"), one(prompt_id="p", prompt="Why?")], "line 1 and line 2 have prompt_id 'p' for two diff"),
        ([], "holds no item"),
    ],
)
def test_bad_benches_are_refused_with_the_row(tmp_path, rows, message):
    write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        load_bench(str(tmp_path / "b.jsonl"))
    assert "\n" not in str(caught.value)


def load_one(tmp_path, **changes):
    write_jsonl(tmp_path / "b.jsonl", [one(**changes)])
    return load_bench(str(tmp_path / "b.jsonl"))[0]


def test_numbers_are_ids_and_names(tmp_path):
    names = {"item_id": 1, "prompt_id": 0, "split": 3, "source": 5}
    item = load_one(tmp_path, **names, preference_set=[preference(dimension=3, subdimension=None)])
    assert (item.item_id, item.prompt_id, item.split, item.source) == ("1", "0", "3", "5")
    assert (item.preference_set[0].dimension, item.preference_set[0].subdimension) == ("3", "")
    # What a table of floating-point numbers makes of 81 and of nothing.
    assert load_one(tmp_path, item_id=81.0, split=float("nan")).item_id == "81"
    assert load_one(tmp_path, preference_set=[preference(dimension=None)]).preference_set[0].dimension == "unnamed"


@pytest.mark.parametrize("reference", [None, "", "  \n", "\u200b", float("nan")])
def test_a_missing_reference_is_empty(tmp_path, reference):
    assert load_one(tmp_path, reference_answer=reference).reference_answer == ""


@pytest.mark.parametrize(
    "written",
    [
        rubric(FIVE),
        rubric(list(FIVE.values())),
        rubric({f"score{score}_description": text for score, text in FIVE.items()}),
        {"criteria": "Is it?", **{f"score{score}_description": text for score, text in FIVE.items()}},
        {"criteria": "Is it?", "score_descriptions": None, **{f"score{s}_description": t for s, t in FIVE.items()}},
        rubric({f"Score {score}": text for score, text in reversed(FIVE.items())}),
    ],
)
def test_spellings_of_a_rubric(tmp_path, written):
    assert load_one(tmp_path, rubrics=[written]).rubrics[0].score_descriptions == FIVE
    assert load_one(tmp_path, rubrics=None, rubric=[written]).rubrics[0].criteria == "Is it?"


def test_a_rubric_may_have_fewer_anchors(tmp_path):
    ends = {"1": "bad", "5": "good"}
    assert load_one(tmp_path, rubrics=[rubric({**ends, "3": None, "4": ""})]).rubrics[0].score_descriptions == ends
    assert load_one(tmp_path, rubrics=[rubric(None)]).rubrics[0].score_descriptions == {}
    read = BenchItem.from_row(one(rubrics=[rubric({1: "bad", 5: "good"})]))
    assert read.rubrics[0].score_descriptions == ends


def judge_prompt(item):
    anchors = sorted(item.rubrics[0].score_descriptions.items())
    return render(
        "judge_absolute",
        prompt=item.prompt,
        response="R",
        reference_answer=item.reference_answer,
        criteria=item.rubrics[0].criteria,
        score_descriptions=anchors,
    )


def test_what_is_missing_is_left_out_of_the_judges_prompt(tmp_path):
    whole = judge_prompt(load_one(tmp_path))
    assert "### Reference answer (score 5)\nSo.\n\n### Criterion\nIs it?\nScore 1: level 1\n" in whole
    partial = judge_prompt(load_one(tmp_path, reference_answer=None, rubrics=[rubric({"1": "bad", "5": "good"})]))
    assert "### Response\nR\n\n### Criterion\nIs it?\nScore 1: bad\nScore 5: good\n\n### Task\n" in partial
    bare = judge_prompt(load_one(tmp_path, rubrics=[rubric(None)]))
    assert "### Criterion\nIs it?\n\n### Task\n" in bare
    assert "None" not in partial + bare and "Reference" not in partial


def test_rows_without_a_split_do_not_stand_for_the_whole(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [one(split="x"), one(prompt="Why?"), one(prompt="When?", split=None)])
    assert [item.split for item in load_bench(str(tmp_path / "b.jsonl"))] == ["x", "unnamed", "unnamed"]


def test_the_same_rows_as_json_array_and_as_parquet(tmp_path):
    rows = [row(item_id="a"), row(prompt="Why?", item_id="b", reference_answer=None)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    of_json, of_parquet = (load_bench(str(tmp_path / name)) for name in ("b.json", "b.parquet"))
    assert of_json == of_parquet
    assert [item.reference_answer for item in of_json] == ["So.", ""]


def published(rows):
    """The rows as the hub holds them: the published columns with their types, in one Parquet file."""
    schema = pa.schema([field for field in BENCH if field.name not in ("item_id", "prompt_id", "split")])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return Repository(
        "kaist-ai/Multifaceted-Bench", {"data/train-00000-of-00001.parquet": sink.getvalue()}, kind="dataset"
    )


def test_the_published_bench_is_read_by_its_id_and_known_by_its_revision(tmp_path, monkeypatch):
    rows = [row(), row(system="Be long."), row(prompt="Why?")]
    with reached(monkeypatch, tmp_path, published(rows)) as hub:
        items = load_bench("kaist-ai/Multifaceted-Bench", max_prompts_per_split=1)
        assert [(item.prompt, item.system) for item in items] == [("How?", "Be brief."), ("How?", "Be long.")]
        assert items[0].rubrics[0].score_descriptions == FIVE
        assert fingerprint("kaist-ai/Multifaceted-Bench") == f"hub:{hub.repositories[0].commit}"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["1", "5", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["1", "5"]), inner)
    ),
    max_leaves=6,
)
HOSTILE_ROWS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("source", "system", "prompt", "item_id", "prompt_id", "split"), JSON_VALUES | st.just("x")),
        "reference_answer": JSON_VALUES,
        "preference_set": JSON_VALUES | st.just([preference()]) | st.lists(JSON_VALUES, min_size=1, max_size=1),
        "rubrics": JSON_VALUES | st.builds(lambda anchors: [rubric(anchors)], JSON_VALUES | st.just(FIVE)),
        "rubric": st.none() | JSON_VALUES,
    },
).map(lambda changes: {**one(), **changes})


@settings(max_examples=50, deadline=None)
@given(HOSTILE_ROWS)
def test_a_hostile_row_is_refused_in_one_line_or_holds_what_was_there(values):
    try:
        item = BenchItem.from_row(values)
    except DataError as error:
        assert "\n" not in str(error)
        return
    texts = [
        item.prompt,
        item.system,
        item.reference_answer,
        item.split,
        item.item_id,
        *item.rubrics[0].score_descriptions,
    ]
    assert all(isinstance(text, str) and text.encode() is not None for text in texts)
    assert item.prompt == well_formed(values["prompt"])
    reference = values["reference_answer"]
    assert item.reference_answer == (
        well_formed(reference) if isinstance(reference, str) and not is_blank(reference) else ""
    )
    assert len(item.rubrics) == len(item.preference_set) == 1


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
        ({"models": [{"name": "m", "model": " "}]}, "models.0.model: must be without spaces around it"),
        ({"models": [{"name": "m ", "model": "m"}]}, "models.0.name: must be without spaces around it"),
        ({"policy": {"provider": "miniature"}}, 'policy.provider: must be "openai", as jobs.serve is'),
        ({"policy": {"provider": "openai"}}, "policy.base_url: is required"),
        ({"policy": {"base_url": "http://h/v1", "model": "m"}}, r"policy.model: name the evaluated models under"),
        ({"judging": {"tempreture": 1}}, r"judging.tempreture: unknown key; allowed: temperature, max_tokens"),
    ],
)
def test_recipes_that_cannot_mean_anything_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(EvaluateRecipe, [], recipe_file(tmp_path, **changes))


def test_a_condition_that_stands_twice_is_one(tmp_path):
    twice = [{"name": "m", "model": "m", "conditions": ["own_system", "no_system", "own_system"]}]
    recipe = load_recipe(EvaluateRecipe, [], recipe_file(tmp_path, models=twice))
    assert recipe.models[0].conditions == ("own_system", "no_system")
