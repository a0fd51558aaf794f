"""What becomes training text: every kind of file, every kind of hole in it, and nothing that was not there."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.text import is_blank, well_formed
from janus_ray.train.collection import left_out, read_collection
from tests.hub import Repository, reached
from tests.tiny import texts, write_collection

GOOD = {"system": "You are brief.", "prompt": "Why?", "output": "So."}


def write(path, rows, schema=None):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def conversations(collection):
    return [row["messages"] for batch in collection.rows.batches() for row in batch.to_pylist()]


def triples(collection):
    """System or None, prompt and output of rows of one turn."""
    found = []
    for messages in conversations(collection):
        roles, contents = zip(*((message["role"], message["content"]) for message in messages), strict=True)
        assert roles in (("user", "assistant"), ("system", "user", "assistant"))
        found.append((None, *contents)[-3:])
    return found


def test_what_cannot_be_trained_is_left_out_and_counted(tmp_path):
    rows = [
        GOOD,
        {**GOOD, "system": None},
        {**GOOD, "system": " \n\u200b"},
        {**GOOD, "prompt": None},
        {**GOOD, "prompt": "\u3000\t"},
        {**GOOD, "output": None},
        {**GOOD, "output": ""},
        {**GOOD, "output": "\u200b\ufeff"},
        {**GOOD, "system": "  kept as it is \n", "output": " So. "},
    ]
    for source in (write(tmp_path / "rows.parquet", rows), write_lines(tmp_path / "rows.jsonl", rows)):
        collection = read_collection(str(source))
        assert triples(collection) == [
            ("You are brief.", "Why?", "So."),
            (None, "Why?", "So."),
            (None, "Why?", "So."),
            ("  kept as it is \n", "Why?", " So. "),
        ]
        assert {name: count for name, count in collection.counts.items() if count} == {
            "rows": 4,
            "rows_without_system": 2,
            "rows_without_prompt": 2,
            "rows_without_output": 3,
        }
        assert left_out(collection.counts) == "2 without prompt, 3 without output"


def test_the_published_columns_and_ours_are_read(tmp_path):
    published = {"main_source": "m", "original_source": "o", "preference_set": "{}", **GOOD}
    folder = tmp_path / "published"
    folder.mkdir()
    write(folder / "train-00000-of-00002.parquet", [published])
    write(folder / "train-00001-of-00002.parquet", [{**published, "system": None}])
    assert triples(read_collection(str(folder))) == [("You are brief.", "Why?", "So."), (None, "Why?", "So.")]
    ours = [{**GOOD, "status": "ok"}, {**GOOD, "status": "server_error", "output": None}, {**GOOD, "status": None}]
    collection = read_collection(str(write(tmp_path / "ours.parquet", ours)))
    assert (collection.counts["rows"], collection.counts["rows_not_ok"]) == (1, 2)
    assert len(read_collection(str(write_collection(tmp_path / "tiny", 9))).rows) == 9
    assert len(texts(9)) == 9


def test_a_published_dataset_is_read_by_its_id(tmp_path, monkeypatch):
    shard = {"main_source": "m", "original_source": "o", "preference_set": "{}", **GOOD}
    parts = [write(tmp_path / "part", [{**shard, "output": f"{part}"}]).read_bytes() for part in range(2)]
    files = {f"data/train-0000{part}-of-00002.parquet": content for part, content in enumerate(parts)}
    published = Repository("kaist-ai/Multifaceted-Collection", files, kind="dataset")
    with reached(monkeypatch, tmp_path / "cache", published):
        collection = read_collection("kaist-ai/Multifaceted-Collection")
        assert triples(collection) == [("You are brief.", "Why?", "0"), ("You are brief.", "Why?", "1")]
        with pytest.raises(DataError, match="dataset kaist-ai/Multifaceted: no such folder here"):
            read_collection("kaist-ai/Multifaceted")


def test_an_array_and_a_table_with_a_header_are_read(tmp_path):
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps([GOOD, {**GOOD, "output": "\ud83d"}]))
    assert triples(read_collection(str(tmp_path / "rows.json")))[1] == ("You are brief.", "Why?", "\ufffd")
    (tmp_path / "rows.csv").write_text('system,prompt,output\n,"Why, then?",So.\n')
    assert triples(read_collection(str(tmp_path / "rows.csv"))) == [(None, "Why, then?", "So.")]


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shards_may_hold_text_in_different_types(tmp_path, kind):
    write(tmp_path / "a.parquet", [GOOD])
    pq.write_table(
        pa.Table.from_pylist([GOOD]).cast(pa.schema([(name, kind) for name in GOOD])), tmp_path / "b.parquet"
    )
    nothing = pa.schema([("system", pa.null()), ("prompt", pa.string()), ("output", kind)])
    pq.write_table(pa.Table.from_pylist([{**GOOD, "system": None}]).cast(nothing), tmp_path / "c.parquet")
    assert triples(read_collection(str(tmp_path))) == [*[tuple(GOOD.values())] * 2, (None, "Why?", "So.")]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("prompt", ["turn 1", "turn 2"], "prompt is a list, expected text"),
        ("prompt", 7, "prompt is a number, expected text"),
        ("prompt", 7.5, "prompt is a number, expected text"),
        ("prompt", True, "prompt is true or false, expected text"),
        ("prompt", [{"role": "user", "content": "x"}], "prompt is a list, expected text"),
        ("output", ["one", "two"], "output is a list, expected text"),
        ("output", {"text": "x"}, "output is an object, expected text"),
        ("output", [], "output is a list, expected text"),
        ("system", 0, "system is a number, expected text"),
        ("status", 200, "status is a number, expected text"),
        ("status", False, "status is true or false, expected text"),
    ],
)
def test_a_column_that_is_no_text_is_refused_with_its_row(tmp_path, column, value, said):
    rows = [{**GOOD, column: value}]
    write(tmp_path / "b.parquet", rows)
    write(tmp_path / "a.parquet", [{**GOOD, "status": "ok"}])
    with pytest.raises(DataError, match=rf"b\.parquet, row 1: {said}$"):
        read_collection(str(tmp_path))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {said}$"):
        read_collection(str(write_lines(tmp_path / "rows.jsonl", [GOOD, *rows])))


def test_bytes_and_dates_are_refused_with_their_row(tmp_path):
    for value, kind, said in ((b"x", pa.binary(), "bytes"), (0, pa.date32(), "a date")):
        table = pa.table({"system": ["s"], "prompt": ["p"], "output": pa.array([value], kind)})
        pq.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=f"row 1: output is {said}, expected text"):
            read_collection(str(tmp_path / "rows.parquet"))


def test_a_status_without_a_type_is_not_ok(tmp_path):
    write(tmp_path / "a.parquet", [{**GOOD, "status": "ok"}])
    write(tmp_path / "b.parquet", [{**GOOD, "status": None}])
    write(tmp_path / "c.parquet", [GOOD])
    counts = read_collection(str(tmp_path)).counts
    assert (counts["rows"], counts["rows_not_ok"]) == (2, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"", "empty"),
        (b"PAR1", "not a Parquet file"),
        (b"PAR1" + bytes(100), "not a Parquet file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "rows.parquet").write_bytes(content)
    for source in (tmp_path, tmp_path / "rows.parquet"):
        with pytest.raises(DataError, match=said) as caught:
            read_collection(str(source))
        assert "rows.parquet" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_cut_parquet_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = write(tmp_path / "rows.parquet", [GOOD] * 50).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "rows.parquet").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"rows\.parquet"):
            read_collection(str(tmp_path))


def test_json_lines_named_parquet_are_read_by_their_content(tmp_path):
    write_lines(tmp_path / "rows.parquet", [GOOD])
    assert triples(read_collection(str(tmp_path))) == [tuple(GOOD.values())]


def test_columns_are_needed_and_named(tmp_path):
    write(tmp_path / "wrong.parquet", [{"prompt": "x", "output": "y"}])
    with pytest.raises(DataError, match=r"wrong\.parquet: no column 'system'; it has: prompt, output"):
        read_collection(str(tmp_path / "wrong.parquet"))
    with pytest.raises(DataError, match=r"rows\.jsonl: no column 'prompt'; it has: system, instruction, output"):
        read_collection(str(write_lines(tmp_path / "rows.jsonl", [{"system": "", "instruction": "x", "output": "y"}])))
    with pytest.raises(DataError, match="no row to train on: 2 whose status is not ok, 1 without output"):
        rows = [{**GOOD, "status": "error"}] * 2 + [{**GOOD, "output": " ", "status": "ok"}]
        read_collection(str(write(tmp_path / "failed.parquet", rows)))
    with pytest.raises(DataError, match="no row to train on"):
        read_collection(str(write(tmp_path / "none.parquet", [], pa.schema([(name, pa.string()) for name in GOOD]))))
    with pytest.raises(DataError, match="no such file or folder"):
        read_collection(str(tmp_path / "none"))


def test_blank_is_what_nobody_can_see():
    assert all(map(is_blank, ["", " \n", "\u200b \ufeff", "\u3164\u2800", "\x00\x1f", "\u00ad"]))
    assert not any(map(is_blank, [".", "\u200bx", "語", "\ufffd", "🙂", "\u3164a", "\ue000"]))


_VALUES = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["ok", " ", "\ud83d", "None", "\u200b", "nan"]),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=1),
)
_ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["system", "prompt", "output", "messages", "status", "other"]), _VALUES, max_size=5
    ),
    max_size=5,
)


# The first text of a process costs a second on a busy machine.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_ROWS)
@example([{**GOOD}, {**GOOD, "prompt": None}, {**GOOD, "system": float("nan")}])
@example([{**GOOD, "status": float("inf")}])
def test_hostile_rows_are_read_counted_or_refused(rows):
    with tempfile.TemporaryDirectory() as folder:
        check_what_is_read(write_lines(Path(folder) / "rows.jsonl", rows), rows)
        # Columns of mixed types are no table.
        with suppress(pa.ArrowException, OverflowError, UnicodeError):
            write(Path(folder) / "rows.parquet", rows)
        if (Path(folder) / "rows.parquet").exists():
            check_what_is_read(Path(folder) / "rows.parquet", rows)


def check_what_is_read(path, rows):
    try:
        collection = read_collection(str(path))
    except DataError as error:
        assert "\n" not in str(error)
        return
    there = {well_formed(value) for row in rows for value in row.values() if isinstance(value, str)}
    for system, prompt, output in triples(collection):
        assert system is None or (system in there and not is_blank(system))
        assert prompt in there
        assert output in there
        assert not is_blank(prompt) and not is_blank(output)
    counts = collection.counts
    assert counts["rows"] == len(collection.rows)
    assert sum(counts.values()) - counts["rows_without_system"] == len(rows)
