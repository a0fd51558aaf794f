"""What becomes of a failed start of the workers; Ray itself is not started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from janus_ray.errors import CheckpointError, TrainingError
from janus_ray.metrics import TRAIN_RESTARTS
from janus_ray.train import launch
from janus_ray.train.recipe import TrainRecipe

LAST = {"step": 9, "loss": 1.0}


def died(rank=1, cause=None):
    failure = WorkerHealthCheckFailedError("health", failure=cause or ActorDiedError())
    # The survivors fail as a consequence.
    return WorkerGroupError("workers", {0: RuntimeError("Connection closed by peer"), rank: failure})


def preempted():
    error = PreemptionError.__new__(PreemptionError)
    Exception.__init__(error, "a node is reclaimed")
    return error


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Runs `fit` with starts that end as given; returns what it returns and where each start went on from."""

    def run(*outcomes, **changes):
        ends, starts = iter(outcomes), []

        def start(recipe, folder, identity, checkpoint, follow):
            starts.append(checkpoint)
            # As if the workers had come to another checkpoint.
            (folder / f"{len(starts)}").mkdir()
            outcome = next(ends)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(launch, "_start_workers", start)
        monkeypatch.setattr(
            launch, "newest_healthy", lambda folder: (next(iter(sorted(folder.iterdir())[-1:]), None), [])
        )
        monkeypatch.setattr(launch, "progress_of", lambda checkpoint: {"step": int(checkpoint.name)})
        recipe = TrainRecipe(collection="c", base_model="b", output_dir=str(tmp_path), **changes)
        return launch.fit(recipe, tmp_path, {}, print), [checkpoint and checkpoint.name for checkpoint in starts]

    return run


def test_workers_that_died_are_started_again_from_what_there_is_by_then(fit, capsys, monkeypatch):
    counted = []
    monkeypatch.setattr(launch, "count", counted.append)
    assert fit(died(), died(), LAST, max_failures=2) == (LAST, [None, "1", "2"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "train: worker 1 died; starting the workers again"
    assert counted == [TRAIN_RESTARTS] * 2
    assert shown[1].startswith("train: going on after step 1, from ")


def test_workers_that_die_too_often_end_the_run_in_one_line(fit):
    with pytest.raises(
        TrainingError, match=r"worker 2 died because the machine ran out of memory, failure 2 of"
    ) as caught:
        fit(died(), died(2, OutOfMemoryError("low on memory")), max_failures=1)
    assert "--if-exists resume" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_that_was_taken_away_is_no_failure(fit, capsys):
    assert fit(preempted(), preempted(), LAST, max_failures=0)[0] == LAST
    assert "a machine was taken away" in capsys.readouterr().out


def test_what_a_worker_said_on_purpose_is_not_tried_again(fit):
    said = CheckpointError("disk is full")
    with pytest.raises(CheckpointError, match="disk is full"):
        fit(WorkerGroupError("workers", {0: RuntimeError("lost"), 1: said}), max_failures=5)


def test_a_gpu_that_is_too_small_is_one_line_at_once(fit):
    with pytest.raises(TrainingError, match="worker 0 ran out of GPU memory: lower bins_per_micro_batch"):
        fit(WorkerGroupError("workers", {0: torch.OutOfMemoryError("CUDA out of memory")}), max_failures=5)


def test_what_nobody_foresaw_is_tried_again_and_then_raised_as_it_is(fit, capsys):
    unforeseen = WorkerGroupError("workers", {0: AttributeError("no such thing")})
    with pytest.raises(WorkerGroupError):
        fit(unforeseen, unforeseen, max_failures=1)
    assert "worker 0 failed: AttributeError; starting the workers again" in capsys.readouterr().out


def test_a_worker_reserves_what_it_works_with():
    api = SimpleNamespace(ScalingConfig=dict)
    inputs = {"collection": "c", "base_model": "b", "output_dir": "o", "num_workers": 3}
    on_cpus = TrainRecipe(**inputs, threads_per_worker=4)
    assert launch._scaling(api, on_cpus) == {"num_workers": 3, "use_gpu": False, "resources_per_worker": {"CPU": 4}}
    on_gpus = TrainRecipe(**inputs, threads_per_worker=4, use_gpu=True)
    assert launch._scaling(api, on_gpus)["resources_per_worker"] == {"CPU": 1, "GPU": 1}
