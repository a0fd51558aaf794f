from __future__ import annotations

import json

import pyarrow as pa
import pytest

from janus_ray.data.recipe import Source
from janus_ray.data.sources import read_instructions
from janus_ray.errors import DataError
from janus_ray.store.files import write_jsonl
from janus_ray.store.tables import write_parquet


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
        ({"prompt_column": "prompt"}, "row 0: no column 'prompt'; it has: instruction, n"),
        ({"prompt_column": "n"}, "column 'n' holds int, expected text"),
        ({"prompt_column": "instruction.0.x"}, "no column 'instruction.0.x'"),
    ],
)
def test_a_wrong_column_is_named_with_those_that_exist(tmp_path, changes, expected):
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "n": 3}])
    with pytest.raises(DataError) as caught:
        read_instructions([source(tmp_path / "a.jsonl", **changes)])
    assert expected in str(caught.value)


def test_missing_empty_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_instructions([source(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no such file or folder"):
        read_instructions([source(tmp_path / "none" / "deep")])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no instruction in"):
        read_instructions([source(tmp_path / "empty.jsonl")])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"unknown ending '.csv'; set format to jsonl or parquet"):
        read_instructions([source(tmp_path / "a.csv")])


def test_a_dataset_id_that_cannot_be_loaded_is_one_line():
    with pytest.raises(DataError, match="neither a file here nor a dataset") as caught:
        read_instructions([source("nobody/no-such-dataset")])
    assert "\n" not in str(caught.value)


def test_ids_do_not_depend_on_the_order(tmp_path):
    rows = [{"instruction": "a"}, {"instruction": "b"}]
    ids = []
    for order in (rows, rows[::-1]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        ids.append({row.prompt: row.prompt_id for row in read_instructions([source(tmp_path / "a.jsonl")])[0]})
    assert ids[0] == ids[1]
