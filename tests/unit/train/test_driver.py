from __future__ import annotations

import json

import pyarrow as pa
import pytest

from janus_ray.store.tables import write_parquet
from janus_ray.train.prepare import PACKED, _content_hash, already_packed
from janus_ray.train.run import new_lines


def test_what_a_restart_does_again_is_printed_again():
    assert new_lines([], ["a", "b"]) == ["a", "b"]
    assert new_lines(["a", "b"], ["a", "b"]) == []
    # Steps two and three were dropped; the second was done again before anybody looked.
    assert new_lines(["a", "b", "c"], ["a", "B"]) == ["B"]
    assert new_lines(["a", "b"], ["A", "B"]) == ["A", "B"]
    assert new_lines(["a", "b"], []) == []


@pytest.fixture
def packed(tmp_path):
    rows = [
        {"input_ids": [1, 5, 2], "loss_mask": [0, 1, 1], "document_lengths": [3], "num_supervised": 2},
        {"input_ids": [1, 7, 2], "loss_mask": [0, 0, 1], "document_lengths": [3], "num_supervised": 1},
    ]
    table = pa.Table.from_pylist(rows, schema=PACKED)
    write_parquet(tmp_path / "packed" / "bins.parquet", table)
    counts = {"bins": 2, "packed_xxh3": _content_hash(table)}
    (tmp_path / "packed" / "counts.json").write_text(json.dumps(counts))
    return tmp_path, table, counts


def test_packed_data_is_used_again_only_while_it_is_whole(packed):
    folder, table, counts = packed
    assert already_packed(folder) == counts
    bins = folder / "packed" / "bins.parquet"
    # The same tokens in another file are the same data.
    write_parquet(bins, table, row_group_rows=1)
    assert already_packed(folder) == counts
    for column, value in (("input_ids", [1, 6, 2]), ("loss_mask", [1, 1, 1]), ("document_lengths", [1, 2])):
        rows = table.to_pylist()
        rows[0][column] = value
        write_parquet(bins, pa.Table.from_pylist(rows, schema=PACKED))
        assert already_packed(folder) is None, column
    write_parquet(bins, table)
    whole = bins.read_bytes()
    bins.write_bytes(whole[: len(whole) // 2])
    assert already_packed(folder) is None
    bins.unlink()
    assert already_packed(folder) is None
    bins.write_bytes(whole)
    (folder / "packed" / "counts.json").write_text("[1]")
    assert already_packed(folder) is None
