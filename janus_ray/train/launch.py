"""Training workers under Ray Train: started, started again from the newest healthy checkpoint when one dies."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from janus_ray.config import resolved
from janus_ray.errors import JanusError, TrainingError
from janus_ray.metrics import TRAIN_RESTARTS, count
from janus_ray.train.checkpoint import CHECKPOINTS, newest_healthy, progress_of, remove_leftovers
from janus_ray.train.recipe import TrainRecipe


def fit(recipe: TrainRecipe, folder: Path, identity: dict[str, str]) -> dict[str, Any]:
    """Trains to the end and returns the last step and its loss, {"step": 120, "loss": 0.5}.

    Args:
        recipe: what to do.
        folder: the run's folder, absolute, with the documents and the plan in it.
        identity: see `train_loop`.

    Raises:
        JanusError: a worker raised it; such a failure would come again and is not tried again.
        TrainingError: workers died more often than the recipe allows.
    """
    from ray.train import TrainingFailedError

    # Ray Train starts workers and says how they ended; where to go on from is looked up anew for each start.
    failures = 0
    while True:
        remove_leftovers(folder)
        checkpoint = _checkpoint_to_go_on_from(folder)
        try:
            return _start_workers(recipe, folder, identity, checkpoint)
        except TrainingFailedError as error:
            _raise_what_would_come_again(error)
            failures += not _is_preemption(error)
            if failures > recipe.max_failures:
                raise _gave_up(error, folder, failures) from None
            count(TRAIN_RESTARTS)
            print(f"train: {_what_happened(error)}; starting the workers again", flush=True)


def _checkpoint_to_go_on_from(folder: Path) -> Path | None:
    checkpoint, complaints = newest_healthy(folder)
    for complaint in complaints:
        print(f"train: damaged checkpoint passed over: {complaint}", flush=True)
    if checkpoint is not None:
        print(f"train: going on after step {progress_of(checkpoint)['step']}, from {checkpoint}", flush=True)
    elif complaints:
        print("train: no healthy checkpoint is left; training starts again at step 1", flush=True)
    return checkpoint


def _start_workers(
    recipe: TrainRecipe, folder: Path, identity: dict[str, str], checkpoint: Path | None
) -> dict[str, Any]:
    # The package picks between two generations of these classes when it is imported, which no type checker can follow.
    api: Any = importlib.import_module("ray.train")
    torch_api: Any = importlib.import_module("ray.train.torch")
    trainer = torch_api.TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": resolved(recipe),
            "folder": str(folder),
            "identity": identity,
            "checkpoint": str(checkpoint) if checkpoint else None,
        },
        scaling_config=api.ScalingConfig(num_workers=recipe.num_workers, use_gpu=recipe.use_gpu),
        torch_config=torch_api.TorchConfig(backend="cpu:gloo,cuda:nccl" if recipe.use_gpu else "gloo"),
        run_config=api.RunConfig(
            # Ray keeps a marker there and nothing else.
            storage_path=str(folder / CHECKPOINTS),
            name=".ray_train",
            failure_config=api.FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    last = trainer.fit().return_value
    assert isinstance(last, dict)
    return last


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    import torch
    from ray.train.torch import get_device
    from transformers.utils import logging as transformers_logging

    from janus_ray.train.loop import train_loop

    transformers_logging.disable_progress_bar()
    recipe = TrainRecipe.model_validate(config["recipe"])
    if not recipe.use_gpu:
        torch.set_num_threads(recipe.threads_per_worker)
    device = get_device()
    assert isinstance(device, torch.device)
    checkpoint = Path(config["checkpoint"]) if config["checkpoint"] else None
    return train_loop(recipe, Path(config["folder"]), config["identity"], checkpoint, device)


def _raise_what_would_come_again(error: Exception) -> None:
    """Raises what a worker said on purpose, and what no further try can mend."""
    import torch

    failures = _failures(error)
    for failure in failures.values():
        if isinstance(failure, JanusError):
            raise failure from None
    for rank, failure in failures.items():
        if isinstance(failure, torch.OutOfMemoryError):
            raise TrainingError(
                f"worker {rank} ran out of GPU memory: lower bins_per_micro_batch, set activation_checkpointing, or "
                "take more workers"
            ) from None


def _gave_up(error: Exception, folder: Path, failures: int) -> Exception:
    """The error that ends the run: one line where workers died, else what they raised, which nobody foresaw."""
    if not _died(error):
        return error
    return TrainingError(
        f"{folder}: {_what_happened(error)}, failure {failures} of this run; --if-exists resume continues from the "
        "newest checkpoint, max_failures allows more, JANUS_LOG_LEVEL=DEBUG shows what the workers say"
    )


def _what_happened(error: Exception) -> str:
    if _is_preemption(error):
        return "a machine was taken away"
    if died := _died(error):
        failure = _failures(error)[died[0]]
        # Ray Train wraps what Ray itself said.
        said = type(getattr(failure, "health_check_failure", failure)).__name__
        return f"worker {died[0]} died{' because the machine ran out of memory' if 'OutOfMemory' in said else ''}"
    return next((f"worker {rank} failed: {type(failure).__name__}" for rank, failure in _failures(error).items()), "?")


def _died(error: Exception) -> list[int]:
    """The ranks whose process ended or stopped to answer; the others fail as a consequence."""
    from ray.exceptions import RayError

    # Ray Train's own errors have no public base class.
    return [
        rank
        for rank, failure in _failures(error).items()
        if isinstance(failure, RayError) or type(failure).__module__.startswith("ray.")
    ]


def _failures(error: Exception) -> dict[int, Exception]:
    return getattr(error, "worker_failures", {})


def _is_preemption(error: Exception) -> bool:
    """Whether a machine was taken away, which says nothing about the run."""
    return type(error).__name__ == "PreemptionError"
