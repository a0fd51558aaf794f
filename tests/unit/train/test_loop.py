"""The loop in this process, without Ray: one worker, a process group of one."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from janus_ray.errors import CheckpointError, TrainingError
from janus_ray.metrics import STEP_LOG
from janus_ray.store.shards import TokenShards
from janus_ray.store.tables import read_jsonl
from janus_ray.train import loop
from janus_ray.train.checkpoint import newest_healthy, progress_of, remove_leftovers
from janus_ray.train.context import LocalContext
from janus_ray.train.plan import make_plan, write_plan
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import documents_in, write_model

IDENTITY = {"template_sha256": "t"}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight bins of two documents, whose second halves carry loss; a plan of three epochs in steps of four."""
    random = np.random.default_rng(0)
    documents = [(random.integers(5, 250, 20).tolist(), [0] * 10 + [1] * 10) for _ in range(16)]
    folder = documents_in(tmp_path_factory.mktemp("data"), documents)
    planned(folder, SETTINGS)
    return folder


SETTINGS = {
    "max_length": 64,
    "bins_per_step": 4,
    "epochs": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "precision": "fp32",
    "activation_checkpointing": False,
    "checkpoint_every_steps": 2,
    "log_every_steps": 1,
}


def planned(folder, settings):
    """Writes the plan of a recipe: of bins of two documents, eight of them."""
    lengths = TokenShards(folder / "documents").index.lengths
    names = ("bins_per_step", "epochs", "max_steps", "seed")
    chosen = {"max_steps": None, "seed": 0, **settings}
    write_plan(make_plan(lengths, np.arange(16)[:, None], 40, *(chosen[name] for name in names)), folder / "plan.npz")


@pytest.fixture
def run(base, data, tmp_path):
    """Runs the loop: six steps, a checkpoint after every second."""

    def start(folder=tmp_path / "run", checkpoint=None, base_model=base, **changes):
        settings = {**SETTINGS, **changes}
        if not folder.exists():
            shutil.copytree(data, folder)
        planned(folder, settings)
        recipe = TrainRecipe(collection="c", base_model=str(base_model), output_dir=str(folder), **settings)
        return loop.train_loop(LocalContext(), recipe, folder, IDENTITY, checkpoint)

    return start


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def losses(folder):
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]


def test_a_line_of_the_step_log_holds_the_metrics_that_there_are(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert all(row.keys() == {"step", "num_steps", "worker_pid", *STEP_LOG} for row in rows)
    # Checkpoints after steps 2, 4 and 6, each written while training goes on, at the latest when the next one begins.
    assert [row["checkpoint_s"] for row in rows[:2]] == [None, None]
    assert all(row["checkpoint_s"] > 0 for row in rows[4:])


def test_a_run_goes_on_from_a_checkpoint_where_it_was_wherever_the_folder_lies(run, finished, tmp_path):
    before = losses(finished)
    assert checkpoints(finished) == ["checkpoint_00000004", "checkpoint_00000006"]
    assert progress_of(finished / "checkpoints" / "checkpoint_00000006")["loss"] == before[-1]
    moved = shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(moved / "model")
    shutil.rmtree(moved / "checkpoints" / "checkpoint_00000006")
    checkpoint, complaints = newest_healthy(moved)
    assert (checkpoint, complaints) == (moved / "checkpoints" / "checkpoint_00000004", [])
    assert run(moved, checkpoint) == {"step": 6, "loss": pytest.approx(before[-1], rel=1e-5)}
    assert losses(moved) == pytest.approx(before, rel=1e-5)
    assert checkpoints(moved) == checkpoints(finished)
    assert (moved / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["halved", "missing", "overwritten"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, file, damage, finished):
    folder = shutil.copytree(finished, tmp_path / "copy")
    [path] = (folder / "checkpoints" / "checkpoint_00000006").rglob(file)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) // 2 if damage == "overwritten" else 0))
    healthy, complaints = newest_healthy(folder)
    assert healthy == folder / "checkpoints" / "checkpoint_00000004"
    assert len(complaints) == 1
    assert "checkpoint_00000006" in complaints[0]
    assert file in complaints[0]
    assert "\n" not in complaints[0]


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """The folder of a run that went through."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("finished") / "run")
    recipe = TrainRecipe(collection="c", base_model=str(base), output_dir=str(folder), **SETTINGS)
    loop.train_loop(LocalContext(), recipe, folder, IDENTITY, None)
    return folder


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["progress", "files", "step", "bytes", "xxh3", "/etc", "a/__0_0.distcp"]), inner
        )
    ),
    max_leaves=8,
)


@given(JSON)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_of_anything_else_is_a_checkpoint_passed_over(finished, record):
    newest = finished / "checkpoints" / "checkpoint_00000006"
    whole = (newest / "checkpoint.json").read_bytes()
    try:
        (newest / "checkpoint.json").write_text(json.dumps(record))
        healthy, [complaint] = newest_healthy(finished)
    finally:
        (newest / "checkpoint.json").write_bytes(whole)
    assert healthy.name == "checkpoint_00000004"
    assert "\n" not in complaint


def test_foreign_folders_among_the_checkpoints_are_left_alone_and_never_used(run, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    kept = folder / "checkpoints" / "checkpoint_best"
    shutil.copytree(folder / "checkpoints" / "checkpoint_00000006", kept)
    healthy, complaints = newest_healthy(folder)
    assert (healthy, complaints) == (folder / "checkpoints" / "checkpoint_00000006", [])
    shutil.rmtree(healthy)
    run(folder, newest_healthy(folder)[0])
    assert checkpoints(folder) == ["checkpoint_00000004", "checkpoint_00000006", "checkpoint_best"]
    assert newest_healthy(tmp_path / "nothing") == (None, [])


def test_a_checkpoint_of_another_run_is_refused(run, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    checkpoint = folder / "checkpoints" / "checkpoint_00000004"
    with pytest.raises(CheckpointError, match="made with another plan_sha256"):
        run(folder, checkpoint, seed=1)
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["progress"]["template_sha256"] = "other"
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="made with another template_sha256"):
        run(folder, checkpoint)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(run, finished, tmp_path):
    wider = write_model(tmp_path / "base", layers=3)
    folder = shutil.copytree(finished, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        run(folder, folder / "checkpoints" / "checkpoint_00000004", base_model=wider)
    assert "\n" not in str(caught.value)


def test_a_rate_that_spoils_the_weights_stops_the_run_and_exports_nothing(run, tmp_path):
    with pytest.raises(TrainingError, match=r"^step 2: the (loss|gradient norm) is not finite") as caught:
        run(learning_rate=1e30)
    assert "no checkpoint" in str(caught.value)
    assert "learning_rate" in str(caught.value)
    assert newest_healthy(tmp_path / "run") == (None, [])
    assert not (tmp_path / "run" / "model").exists()
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize("rate", [1e30, 1e2])
def test_the_last_step_is_looked_at_as_well(run, tmp_path, rate):
    with pytest.raises(TrainingError, match=r"^after step 1: .*(is not finite|nats per token is no model)"):
        run(learning_rate=rate, max_steps=1)
    assert newest_healthy(tmp_path / "run") == (None, [])
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_turns_bad_leaves_the_last_healthy_checkpoint(run, tmp_path, monkeypatch):
    plain, calls = loop.summed_loss, []

    def turning(model, batch):
        calls.append(batch)
        # Two micro-batches a step, one look before each checkpoint: the sixth is of the third step.
        return plain(model, batch) * (float("inf") if len(calls) == 6 else 1)

    monkeypatch.setattr(loop, "summed_loss", turning)
    with pytest.raises(TrainingError, match=r"^step 3: the loss is not finite .*the checkpoint of step 2 is kept"):
        run()
    assert checkpoints(tmp_path / "run") == ["checkpoint_00000002"]
    healthy, complaints = newest_healthy(tmp_path / "run")
    assert complaints == []
    assert progress_of(healthy)["step"] == 2
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_in_the_base_that_is_not_finite_stops_before_the_first_step(run, base, tmp_path, value):
    from safetensors.torch import load_file, save_file

    spoilt = shutil.copytree(base, tmp_path / "base")
    weights = load_file(spoilt / "model.safetensors")
    # A row that no token of the data uses: no loss would ever show it.
    weights["model.embed_tokens.weight"][300, 3] = value
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"model\.embed_tokens\.weight holds values that are not finite.*step 1"):
        run(base_model=spoilt)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_at_a_checkpoint_names_the_folder_and_keeps_the_older_one(run, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "checkpoint_00000006")
    shutil.rmtree(folder / "model")
    plain = dcp.filesystem._write_item

    def full(*arguments, **keywords):
        plain(*arguments, **keywords)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="No space left on device") as caught:
        patched.setattr(dcp.filesystem, "_write_item", full)
        run(folder, newest_healthy(folder)[0])
    assert str(folder / "checkpoints" / "checkpoint_00000006") in str(caught.value)
    assert "--if-exists resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints(folder) == ["checkpoint_00000004"]
    assert not (folder / "model").exists()


def test_another_failure_during_a_save_is_not_taken_for_a_full_disk(run, monkeypatch):
    def lost(*arguments, **keywords):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dcp, "save", lost)
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        run()
    assert not isinstance(caught.value, CheckpointError)


def test_what_a_killed_save_left_is_never_used_and_goes_with_the_next_that_is_complete(run, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    newest = folder / "checkpoints" / "checkpoint_00000006"
    # Everything but the record, which is written last.
    (newest / "checkpoint.json").unlink()
    (folder / "documents" / ".index.npz.7.tmp").write_text("half of it")
    remove_leftovers(folder)
    assert not (folder / "documents" / ".index.npz.7.tmp").exists()
    healthy, complaints = newest_healthy(folder)
    assert healthy == folder / "checkpoints" / "checkpoint_00000004"
    assert complaints == [f"{newest}: it was never finished, or checkpoint.json is missing"]
    torn = {file.relative_to(newest) for file in newest.rglob("*.distcp")}
    shutil.rmtree(folder / "model")
    assert run(folder, healthy)["step"] == 6
    assert newest_healthy(folder) == (newest, [])
    assert not torn & {file.relative_to(newest) for file in newest.rglob("*.distcp")}
