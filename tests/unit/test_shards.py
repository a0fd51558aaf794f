"""Token shards: what was written is what is read, document by document, and damage is found."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import ConfigError, DataError
from janus_ray.store.shards import Index, TokenShards, damage, finish_shards, id_type, joined, write_shard

LARGE = id_type(1 << 20)
DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=6), max_size=5)


def written(folder, shards, dtype=LARGE):
    """Writes each list of documents as a shard, in backward order, as processes may."""
    entries, indices = {}, {}
    for number, documents in reversed(list(enumerate(shards))):
        flat = [token for document in documents for token in document]
        ids, mask = np.array([token for token, _ in flat], dtype), np.array([loss for _, loss in flat], bool)
        entries[number] = write_shard(folder, number, ids, mask, len(documents))
        supervised = [sum(loss for _, loss in document) for document in documents]
        indices[number] = Index(*map(np.array, (list(map(len, documents)), supervised, list(range(len(documents))))))
    order = range(len(shards))
    finish_shards(folder, [entries[n] for n in order], dtype, joined(indices[n] for n in order))
    return TokenShards(folder)


@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
@settings(max_examples=40)
def test_every_document_comes_back_from_its_shard(shards):
    with tempfile.TemporaryDirectory() as folder:
        found = written(Path(folder), shards)
        documents = [document for shard in shards for document in shard]
        assert len(found) == len(documents)
        for number in reversed(range(len(documents))):
            ids, mask = found[number]
            assert list(zip(ids.tolist(), mask.tolist(), strict=True)) == documents[number]
            assert found.index.lengths[number] == len(ids)
            assert found.index.supervised[number] == mask.sum()
        assert damage(Path(folder)) is None


def test_only_the_documents_that_are_asked_for_are_opened(tmp_path):
    found = written(tmp_path, [[[(1, False), (2, True)]], [[(3, True)], [(4, True)]], [[(5, True)]]])
    for other in ("shard-00000.tokens", "shard-00002.tokens"):
        (tmp_path / other).unlink()
    assert [part.tolist() for part in found[2]] == [[4], [True]]
    with pytest.raises(FileNotFoundError):
        found[0]


def test_ids_take_two_bytes_where_the_vocabulary_allows_it(tmp_path):
    assert (id_type(65_536).itemsize, id_type(65_537).itemsize) == (2, 4)
    found = written(tmp_path, [[[(65_535, True)] * 10]], id_type(65_536))
    assert (tmp_path / "shard-00000.tokens").stat().st_size == 30
    assert found[0][0].tolist() == [65_535] * 10
    # The file is mapped, not read.
    assert not found[0][0].flags.owndata


def test_without_the_record_there_are_no_documents(tmp_path):
    write_shard(tmp_path, 0, np.array([1], "<u2"), np.array([True]), 1)
    with pytest.raises(ConfigError, match=r"shards\.json: no such file on .*storage that every node sees"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("change", [{"dtype": "nonsense"}, {"shards": 7}, {"shards": [{"name": "x"}]}, None])
def test_a_record_of_something_else_is_refused_in_one_line(tmp_path, change):
    import json

    written(tmp_path, [[[(1, True)]]])
    record = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps([] if change is None else {**record, **change}))
    with pytest.raises(DataError, match=r"shards\.json or index\.npz is damaged") as caught:
        TokenShards(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hash_says_what_is_in_them(tmp_path):
    one = written(tmp_path / "a", [[[(1, False), (2, True)]]]).xxh3
    assert written(tmp_path / "b", [[[(1, False), (2, True)]]]).xxh3 == one
    others = ([[[(1, False), (3, True)]]], [[[(1, True), (2, True)]]], [[[(1, False)], [(2, True)]]])
    found = {written(tmp_path / f"{number}", other).xxh3 for number, other in enumerate(others)}
    assert len(found | {one}) == 4


@given(st.sampled_from(["shards.json", "index.npz", "shard-00000.tokens"]), st.binary(max_size=30), st.integers(0, 900))
@settings(max_examples=60)
def test_whatever_is_written_over_a_file_the_documents_are_the_same_or_damaged(file, content, position):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        before = written(Path(folder), [[[(1, False), (2, True)]], [[(3, True)]]]).xxh3
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + content + whole[position + len(content) :])
        complaint = damage(Path(folder))
        if complaint is None:
            assert TokenShards(Path(folder)).xxh3 == before
        else:
            assert complaint and "\n" not in complaint
