"""Tokenising in processes of a cluster: the same documents as in one process, and their errors are ours."""

from __future__ import annotations

import pytest

from janus_ray.errors import CheckpointError
from janus_ray.store.shards import TokenShards
from janus_ray.train import collection as collection_module
from janus_ray.train import prepare as prepare_module
from janus_ray.train.collection import read_collection
from janus_ray.train.plan import read_plan
from janus_ray.train.prepare import in_ray, in_this_process, prepare
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import write_collection, write_model


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    # Eight batches: more than wait at two processes at once.
    monkeypatch.setattr(collection_module, "BATCH_ROWS", 8)
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 8)
    return TrainRecipe(
        collection=str(write_collection(tmp_path / "rows", 61)),
        base_model=str(write_model(tmp_path / "base")),
        output_dir=str(tmp_path / "out"),
        max_length=128,
    )


def test_many_processes_make_the_documents_of_one(recipe, tmp_path):
    found = []
    for name, write_all in (("one", in_this_process), ("many", in_ray)):
        counts = prepare(recipe, read_collection(recipe.collection), tmp_path / name, write_all)
        shards = TokenShards(tmp_path / name / "documents")
        assert len(shards.entries) == 8
        assert shards.index.rows.tolist() == list(range(61))
        found.append((counts, read_plan(tmp_path / name / "plan.npz").sha256))
    assert found[0] == found[1]


def test_what_a_process_raises_is_one_line_of_ours(recipe, tmp_path):
    batches = read_collection(recipe.collection).rows.batches()
    elsewhere = recipe.model_copy(update={"base_model": str(tmp_path / "not on this machine")})
    with pytest.raises(CheckpointError, match="not on this machine: no such folder") as caught:
        list(in_ray(elsewhere, tmp_path / "documents", batches, 8))
    assert "\n" not in str(caught.value)
