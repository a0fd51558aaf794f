"""The loop in several processes of this machine, without Ray: what depends neither on their number nor on their end."""

from __future__ import annotations

import os
import shutil
import signal
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from janus_ray.errors import TrainingError
from janus_ray.store.shards import TokenShards
from janus_ray.store.tables import read_jsonl
from janus_ray.train.checkpoint import newest_healthy, progress_of
from janus_ray.train.context import LocalWorkers
from janus_ray.train.loop import train_loop
from janus_ray.train.plan import make_plan, write_plan
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import documents_in, write_model

# What is hard in one small model: tied embeddings, a window shorter than a document, soft caps, a scaled embedding.
GEMMA = {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
# Five bins a step: no number of workers above one divides them.
SETTINGS = {
    "max_length": 40,
    "bins_per_step": 5,
    "epochs": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "precision": "fp32",
    "activation_checkpointing": False,
    "checkpoint_every_steps": 4,
    "log_every_steps": 1,
}
STEPS = 9


@pytest.fixture(scope="module")
def workers():
    return LocalWorkers()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), kind="gemma2", special=GEMMA)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty documents of 14 to 20 tokens, two a bin, with a plan of nine steps."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(30):
        length = int(random.integers(14, 21))
        documents.append((random.integers(5, 250, length).tolist(), [0] * 6 + [1] * (length - 6)))
    folder = documents_in(tmp_path_factory.mktemp("data"), documents)
    lengths = TokenShards(folder / "documents").index.lengths
    plan = make_plan(lengths, np.arange(30)[:, None], 40, SETTINGS["bins_per_step"], SETTINGS["epochs"], None, 0)
    assert len(plan) == STEPS
    write_plan(plan, folder / "plan.npz")
    return folder


@pytest.fixture
def run(workers, base, data):
    def start(folder, num_workers, work=train_loop, checkpoint=None, base_model=base, **changes):
        if not folder.exists():
            shutil.copytree(data, folder)
        settings = {**SETTINGS, **changes}
        recipe = TrainRecipe(collection="c", base_model=str(base_model), output_dir=str(folder), **settings)
        return workers.run(num_workers, work, recipe, folder, {"template_sha256": "t"}, checkpoint)

    return start


def curve(folder):
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def with_two(workers, base, data, tmp_path_factory):
    """The folder of a run with two workers that went through."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("two") / "run")
    recipe = TrainRecipe(collection="c", base_model=str(base), output_dir=str(folder), **SETTINGS)
    last = workers.run(2, train_loop, recipe, folder, {"template_sha256": "t"}, None)
    assert last[0] == last[1] == {"step": STEPS, "loss": curve(folder)[-1]}
    return folder


@pytest.mark.parametrize(("num_workers", "per_micro_batch"), [(1, 3), (4, 1)])
def test_the_losses_do_not_depend_on_the_number_of_workers(run, with_two, tmp_path, num_workers, per_micro_batch):
    run(tmp_path / "run", num_workers, bins_per_micro_batch=per_micro_batch)
    theirs = curve(with_two)
    assert len(theirs) == STEPS
    assert theirs[-1] < 0.9 * theirs[0]
    # The order of summation differs, and training amplifies that.
    assert curve(tmp_path / "run") == pytest.approx(theirs, rel=1e-3)
    assert curve(tmp_path / "run")[:3] == pytest.approx(theirs[:3], rel=1e-5)


def test_a_run_goes_on_with_another_number_of_workers(run, with_two, tmp_path):
    folder = shutil.copytree(with_two, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / f"checkpoint_{STEPS:08d}")
    checkpoint, _ = newest_healthy(folder)
    assert progress_of(checkpoint)["step"] == 8
    run(folder, 1, checkpoint=checkpoint)
    assert curve(folder) == pytest.approx(curve(with_two), rel=1e-4)


def test_a_value_that_is_not_finite_ends_the_run_on_every_rank(run, base, tmp_path):
    from safetensors.torch import load_file, save_file

    spoilt = shutil.copytree(base, tmp_path / "base")
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        run(tmp_path / "run", 2, base_model=spoilt)
    assert not (tmp_path / "run" / "model").exists()


def killed_in_a_checkpoint(context, recipe, folder, identity, checkpoint):
    """Every rank is killed while it writes its part of the second checkpoint, as where a machine goes down."""
    from torch.distributed.checkpoint import filesystem

    plain = filesystem._write_item

    def killing(*arguments, **keywords):
        written = plain(*arguments, **keywords)
        if (folder / "checkpoints" / "checkpoint_00000004" / "checkpoint.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    filesystem._write_item = killing
    return train_loop(context, recipe, folder, identity, checkpoint)


def test_workers_killed_in_the_middle_of_a_checkpoint_leave_nothing_that_resumes_wrongly(run, with_two, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(BrokenProcessPool):
        run(folder, 2, work=killed_in_a_checkpoint)
    torn = folder / "checkpoints" / "checkpoint_00000008"
    assert any(torn.rglob("__*.distcp"))
    checkpoint, complaints = newest_healthy(folder)
    assert progress_of(checkpoint)["step"] == 4
    assert len(complaints) == 1
    run(folder, 2, checkpoint=checkpoint)
    assert curve(folder) == pytest.approx(curve(with_two), rel=1e-5)
    assert [newest_healthy(folder)[0].name, newest_healthy(folder)[1]] == [f"checkpoint_{STEPS:08d}", []]
    assert len(list((folder / "checkpoints").iterdir())) == 2
