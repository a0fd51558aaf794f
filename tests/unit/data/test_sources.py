from __future__ import annotations

import io
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from janus_ray.data.recipe import Source
from janus_ray.data.sources import read_instructions
from janus_ray.errors import DataError
from janus_ray.store.files import write_jsonl
from janus_ray.store.tables import write_parquet
from janus_ray.text import well_formed_values
from tests.hub import Repository, reached


def source(path, **changes):
    return Source(path=str(path), **changes)


def test_columns_nested_columns_and_inputs(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(
        path,
        [
            {"turns": ["First?", "Second?"], "kind": "math", "instances": [{"input": ""}]},
            {"turns": ["Other."], "kind": "prose", "instances": [{"input": "The text."}]},
        ],
    )
    found, counts = read_instructions(
        [source(path, prompt_column="turns.0", input_column="instances.0.input", source_column="kind", name="bench")]
    )
    assert [(row.prompt, row.main_source, row.original_source) for row in found] == [
        ("First?", "bench", "math"),
        ("Other.\n\nThe text.", "bench", "prose"),
    ]
    assert counts == {"read": 2, "empty": 0, "duplicate": 0}


def test_duplicates_across_sources_are_dropped_and_the_first_is_kept(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Do it. "}, {"instruction": ""}, {"instruction": None}])
    write_parquet(tmp_path / "b.parquet", pa.table({"instruction": ["Do\n it.", "do it."]}))
    found, counts = read_instructions([source(tmp_path / "a.jsonl"), source(tmp_path / "b.parquet")])
    assert [(row.prompt, row.main_source) for row in found] == [("Do it.", "a"), ("do it.", "b")]
    assert counts == {"read": 5, "empty": 2, "duplicate": 1}


def test_the_limit_counts_rows_of_its_source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": str(i)} for i in range(5)])
    assert len(read_instructions([source(tmp_path / "a.jsonl", limit=2)])[0]) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt_column": "prompt"}, "a.jsonl: no column 'prompt'; it has: instruction, n"),
        ({"input_column": "input"}, "a.jsonl: no column 'input'; it has: instruction, n"),
        ({"source_column": "kind"}, "a.jsonl: no column 'kind'; it has: instruction, n"),
        ({"prompt_column": "n"}, "a.jsonl, line 1: column 'n' holds int, expected text"),
        ({"input_column": "n"}, "a.jsonl, line 1: column 'n' holds int, expected text"),
        ({"prompt_column": "instruction.0.x"}, "no column 'instruction.0.x'"),
    ],
)
def test_a_column_that_is_in_no_row_is_named_with_those_that_exist(tmp_path, changes, expected):
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "n": 3}, {"instruction": "y", "n": 4}])
    with pytest.raises(DataError) as caught:
        read_instructions([source(tmp_path / "a.jsonl", **changes)])
    assert expected in str(caught.value)


def test_alpacas_own_file_is_read(tmp_path):
    rows = [
        {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
        {"instruction": "Write a haiku.", "input": "", "output": "..."},
    ]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows, indent=4))
    found, counts = read_instructions([source(tmp_path / "alpaca_data.json", input_column="input")])
    assert [row.prompt for row in found] == ["Name the capital.\n\nFrance", "Write a haiku."]
    assert counts == {"read": 2, "empty": 0, "duplicate": 0}


def test_an_odd_row_is_left_out_counted_and_said_by_its_line(tmp_path, capsys):
    lines = [
        '{"instruction": "Good.", "input": "more", "kind": "a"}',
        "",
        '{"input": "an input alone"}',
        '{"instruction": NaN}',
        '{"instruction": null}',
        '{"instruction": "\\u200b"}',
        '{"instruction": 17}',
        '{"instruction": ["a", "list"]}',
        '{"instruction": "Number as input.", "input": 17}',
        '{"instruction": "No input here."}',
        '{"instruction": "Null input.", "input": null, "kind": 7}',
    ]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    found, counts = read_instructions([source(tmp_path / "a.jsonl", input_column="input", source_column="kind")])
    assert [(row.prompt, row.original_source) for row in found] == [
        ("Good.\n\nmore", "a"),
        ("No input here.", "a"),
        ("Null input.", "7"),
    ]
    assert counts == {
        "read": 10,
        "empty": 3,
        "duplicate": 0,
        "no_prompt_column": 1,
        "prompt_not_text": 2,
        "input_not_text": 1,
        "without_input_column": 1,
    }
    said = capsys.readouterr().out
    assert "left out 1 of 10 rows without the column 'instruction'; the first: line 3\n" in said
    assert "'instruction'; the first: line 7: column 'instruction' holds int, expected text\n" in said
    assert "'input'; the first: line 9: column 'input' holds int, expected text\n" in said


def test_half_a_surrogate_pair_never_leaves_the_reader(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "ok \\ud83d", "k": "\\udc00"}\n{"instruction": "\\ud83d\\ude00"}\n'
    )
    found, _ = read_instructions([source(tmp_path / "a.jsonl")])
    assert [row.prompt for row in found] == ["ok \ufffd", "\U0001f600"]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_instructions([source(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no such file or folder"):
        read_instructions([source(tmp_path / "none" / "deep")])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no instruction in"):
        read_instructions([source(tmp_path / "empty.jsonl")])


def test_a_published_collection_gives_its_prompts(tmp_path, monkeypatch):
    value = {"dimension": "style", "subdimension": "clarity", "preference": "brief", "description": "Short."}
    rows = {
        "main_source": ["OpenHermesPreferences", "Nectar"],
        "original_source": ["caseus_custom", "anthropic-hh"],
        "preference_set": [[value] * 4, [value] * 4],
        "system": ["You are brief.", "You are kind."],
        "prompt": ["How do I castle?", "What is bread?"],
        "output": ["Early.", "Flour."],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(rows), sink)
    files = {"data/train-00000-of-00001.parquet": sink.getvalue()}
    with reached(monkeypatch, tmp_path, Repository("kaist-ai/Multifaceted-Collection", files, kind="dataset")):
        taken = source("kaist-ai/Multifaceted-Collection", prompt_column="prompt", source_column="original_source")
        found, _ = read_instructions([taken])
    assert [(row.prompt, row.main_source, row.original_source) for row in found] == [
        ("How do I castle?", "kaist-ai/Multifaceted-Collection", "caseus_custom"),
        ("What is bread?", "kaist-ai/Multifaceted-Collection", "anthropic-hh"),
    ]


def test_a_dataset_id_that_cannot_be_loaded_is_one_line():
    with pytest.raises(DataError, match="no such folder here, not in the cache") as caught:
        read_instructions([source("nobody/no-such-dataset")])
    assert "\n" not in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "turns", "a.b"]), inner, max_size=2)
    ),
    max_leaves=6,
)
hostile_rows = st.dictionaries(st.sampled_from(["instruction", "input", "turns", "a.b", "kind"]), values, max_size=4)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    rows=st.lists(hostile_rows | st.fixed_dictionaries({"instruction": st.text(max_size=8)}), max_size=6),
    array=st.booleans(),
    column=st.sampled_from(["instruction", "turns.0", "a.b", "turns.-1"]),
    input_column=st.sampled_from([None, "input", "kind.0"]),
)
def test_hostile_rows_give_texts_that_were_there_or_an_error_of_ours(tmp_path, rows, array, column, input_column):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    try:
        found, counts = read_instructions([source(path, prompt_column=column, input_column=input_column)])
    except DataError as error:
        assert "\n" not in str(error)
        return
    there = set(texts(well_formed_values(json.loads(json.dumps(rows)))))
    for row in found:
        row.prompt.encode()
        assert row.prompt in there or any(row.prompt == f"{a}\n\n{b}" for a in there for b in there)
    left = sum(number for name, number in counts.items() if name not in ("read", "without_input_column"))
    assert counts["read"] == len(rows) == len(found) + left


def texts(value):
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def test_ids_do_not_depend_on_the_order(tmp_path):
    rows = [{"instruction": "a"}, {"instruction": "b"}]
    ids = []
    for order in (rows, rows[::-1]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        ids.append({row.prompt: row.prompt_id for row in read_instructions([source(tmp_path / "a.jsonl")])[0]})
    assert ids[0] == ids[1]


def test_instructions_lie_on_disk_and_can_be_gone_through_again(tmp_path):
    rows = [{"instruction": f"Question {number}?"} for number in range(2500)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found, _ = read_instructions([source(tmp_path / "a.jsonl")])
    first, second = ([row.prompt for row in found] for _ in range(2))
    assert first == second == [row["instruction"] for row in rows]
    assert len(found) == len(set(found.ids.tolist())) == len(set(found.contents.tolist())) == 2500
    found.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"the instructions cannot be kept there: File too large$"):
            read_instructions([source(tmp_path / "a.jsonl")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
