"""A run whose every folder lies on S3 (a real server on loopback): documents, checkpoints, metrics, the model."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from janus_ray.errors import CheckpointError, DataError
from janus_ray.model_folder import check_model_folder
from janus_ray.store.files import files_below, read_bytes
from janus_ray.store.location import location
from janus_ray.store.shards import TokenShards, damage
from janus_ray.train.checkpoint import newest_healthy, progress_of
from janus_ray.train.collection import read_collection
from janus_ray.train.context import LocalWorkers
from janus_ray.train.loop import train_loop
from janus_ray.train.prepare import already_prepared, in_this_process, prepare
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import write_collection, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(s3, base, tmp_path, monkeypatch):
    monkeypatch.setenv("JANUS_CACHE_DIR", str(tmp_path / "cache"))
    return TrainRecipe(
        collection=str(write_collection(tmp_path / "rows", 40)),
        base_model=str(base),
        output_dir=s3.folder(),
        max_length=128,
        bins_per_step=5,
        epochs=3,
        precision="fp32",
        activation_checkpointing=False,
        checkpoint_every_steps=2,
        log_every_steps=1,
    )


def prepared(recipe):
    return prepare(recipe, read_collection(recipe.collection), recipe.output_dir, in_this_process)


def run(recipe, checkpoint=None, kill=False):
    names = ("JANUS_CACHE_DIR", *(name for name in os.environ if name.startswith("AWS_")))
    environment = {name: os.environ[name] for name in names}
    reference = str(checkpoint) if checkpoint else None
    return LocalWorkers().run(2, worker, environment, kill, recipe, recipe.output_dir, {}, reference)


def worker(context, environment, kill, recipe, folder, *arguments):
    os.environ.update(environment)
    if kill:
        from torch.distributed.checkpoint import filesystem

        plain = filesystem._write_item

        def killing(*given, **keywords):
            written = plain(*given, **keywords)
            if newest_healthy(folder)[0] is not None:
                # The first checkpoint is complete: this is the second.
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        filesystem._write_item = killing
    return train_loop(context, recipe, folder, *arguments)


def test_a_run_on_object_storage_is_killed_goes_on_and_leaves_a_model(recipe, tmp_path):
    counts = prepared(recipe)
    folder = location(recipe.output_dir)
    assert already_prepared(folder) == counts
    with pytest.raises(BrokenProcessPool):
        run(recipe, kill=True)
    checkpoint, _ = newest_healthy(folder)
    assert progress_of(checkpoint)["step"] == 2
    last = run(recipe, checkpoint)[0]
    assert newest_healthy(folder)[1] == []
    found = [file.name for file in files_below(folder)]
    assert {name.split("/")[0] for name in found} == {"checkpoints", "documents", "metrics.jsonl", "model", "plan.npz"}
    # The newest two, each with a part of each rank, and nothing of the killed one.
    parts = [name for name in found if name.endswith(".distcp")]
    assert len(parts) == 4
    assert len({name.split("/")[1] for name in parts}) == 2
    steps = [json.loads(line)["step"] for line in read_bytes(folder / "metrics.jsonl").splitlines()]
    assert steps == list(range(1, last["step"] + 1))
    (folder / "model").fs.get((folder / "model").path, str(tmp_path / "model"), recursive=True)
    assert check_model_folder(tmp_path / "model") == counts["template_sha256"]


def test_documents_on_object_storage_are_fetched_once_and_not_trusted(recipe, s3, tmp_path):
    prepared(recipe)
    folder = location(recipe.output_dir) / "documents"
    shards = TokenShards(folder)
    assert damage(folder) is None
    s3.heal()
    shards[0], shards[5], TokenShards(folder)[3]
    assert sum(request.startswith("GET") and "shard-00000" in request for request in s3.requests()) == 1
    content = read_bytes(folder / "shard-00000.tokens")
    location(folder / "shard-00000.tokens").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for cached in (tmp_path / "cache" / "shards").iterdir():
        cached.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tokens: is damaged"):
        TokenShards(folder)[0]
    location(folder / "shard-00000.tokens").write_bytes(content[:-1])
    assert damage(folder).startswith("shard-00000.tokens has ")


def test_a_storage_that_refuses_a_checkpoint_is_one_line_and_the_older_one_stays(recipe, s3):
    prepared(recipe)
    s3.fail("refuse", method="PUT", key="checkpoint_00000004")
    with pytest.raises(CheckpointError, match="checkpoint_00000004 cannot be written: the storage refuses") as caught:
        run(recipe)
    s3.heal()
    assert "\n" not in str(caught.value)
    assert "--if-exists resume" in str(caught.value)
    checkpoint, complaints = newest_healthy(recipe.output_dir)
    assert (progress_of(checkpoint)["step"], complaints) == (2, [])
