from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.job import _for_a_person
from janus_ray.store.files import write_bytes, write_jsonl
from janus_ray.store.hub import dataset_files
from janus_ray.store.location import location
from janus_ray.store.tables import read_jsonl, read_parquet, read_rows, write_parquet
from janus_ray.train.collection import read_collection


@pytest.fixture
def remote(s3, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    return location(s3.folder())


def outcome(file):
    try:
        return [(row.place, row.values) for row in read_rows(str(file))]
    except DataError as error:
        return str(error).replace(str(file.parent), "")


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(3000), "t": ["ü"] * 3000}), sink, row_group_size=700)
    return sink.getvalue()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    content=st.binary(max_size=60) | st.text(st.sampled_from('[]{}":,;\t\n\r \\é\ufeff'), max_size=60).map(str.encode),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a*[b]?.jsonl"]),
)
@example(content=gzip.compress(b'{"a": 1}\n{"a": 2}\n'), name="a.jsonl.gz")
@example(content=b'n;t\n1;"x\ny"\n', name="a.csv")
@example(content=parquet(), name="a.parquet")
@example(content=parquet()[:-9], name="a.parquet")
@example(content=b'[{"a": 1},\n{"a": 2}]', name="a b%20#.json")
@example(content=b"", name="a.parquet")
def test_a_file_is_read_from_an_object_storage_as_from_a_folder(tmp_path, remote, content, name):
    (tmp_path / name).write_bytes(content)
    if "?" in name:
        with pytest.raises(DataError, match=r"must not hold \?"):
            location(str(remote / name))
        return
    write_bytes(remote / name, content)
    assert outcome(remote / name) == outcome(tmp_path / name)


def test_folders_are_read_by_split_and_tables_by_column(remote):
    write_jsonl(remote / "data" / "train-00000-of-00002.jsonl", [{"n": 1}])
    write_jsonl(remote / "data" / "train-00001-of-00002.jsonl", [{"n": 2}])
    write_jsonl(remote / "data" / "test.jsonl", [{"n": 3}])
    assert [row.values["n"] for row in read_rows(str(remote))] == [1, 2]
    assert [row.place for row in read_rows(str(remote), split="test")] == ["test.jsonl, line 1"]
    assert read_jsonl(remote / "data" / "test.jsonl") == [{"n": 3}]
    for number in range(2):
        write_parquet(remote / "table" / f"part-{number}.parquet", pa.table({"n": [number], "t": ["x"]}))
    assert read_parquet(str(remote / "table"), ["n"]).to_pylist() == [{"n": 0}, {"n": 1}]
    with pytest.raises(DataError, match=r"s3://.*part-0\.parquet: no column 'x'; it has: n, t"):
        read_parquet(remote / "table", ["x"])
    for look in (lambda path: list(read_rows(path)), dataset_files, read_collection, read_jsonl, read_parquet):
        with pytest.raises(DataError, match=r"s3://.*nothing: no such file"):
            look(str(remote / "nothing"))


def test_a_storage_that_fails_while_rows_are_read_is_one_line(remote, s3):
    write_bytes(remote / "a.parquet", parquet())
    write_bytes(remote / "a.jsonl", json.dumps({"a": 1}).encode())
    for kind, reason in (("cut", "cannot be read|not a Parquet file"), ("refuse", "refuses these credentials")):
        for name in ("a.parquet", "a.jsonl"):
            s3.fail(kind, "GET")
            with pytest.raises(DataError, match=reason) as caught:
                list(read_rows(str(remote / name)))
            assert "\n" not in str(caught.value)
            s3.heal()


def test_what_a_storage_says_where_nobody_of_ours_asked_is_one_line_of_a_job(remote, s3):
    s3.fail("refuse")
    with pytest.raises(PermissionError) as caught:
        remote.fs.pipe_file(f"{remote.path}/x", b"")
    assert "the storage refuses these credentials" in _for_a_person(caught.value)
    assert _for_a_person(PermissionError("of something else")) is None
