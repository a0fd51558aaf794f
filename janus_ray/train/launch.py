"""Training workers under Ray Train: started, started again from the newest healthy checkpoint when one dies."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from janus_ray.config import resolved
from janus_ray.errors import JanusError, TrainingError
from janus_ray.metrics import TRAIN_RESTARTS, count
from janus_ray.store.files import arrow_filesystem
from janus_ray.store.hub import model_folder
from janus_ray.store.location import location
from janus_ray.train.checkpoint import CHECKPOINTS, newest_healthy, progress_of, remove_leftovers
from janus_ray.train.context import Record
from janus_ray.train.recipe import TrainRecipe

if TYPE_CHECKING:
    import torch

_FETCH_S = 0.5
# As long as the driver waits for its own actor at the most.
_ANSWER_S = 10.0


def fit(
    recipe: TrainRecipe, folder: Path | UPath, identity: dict[str, str], follow: Callable[[Record], None]
) -> dict[str, Any]:
    """Trains to the end and returns the last step and its loss, {"step": 120, "loss": 0.5}.

    Args:
        recipe: what to do.
        folder: the run's folder, absolute, with the documents and the plan in it.
        identity: see `train_loop`.
        follow: called with each line of metrics as it comes, from whatever machine.

    Raises:
        JanusError: a worker raised it; such a failure would come again and is not tried again.
        TrainingError: workers died more often than the recipe allows.
    """
    from ray.train import TrainingFailedError

    # Ray Train starts workers and says how they ended; where to go on from is looked up anew for each start.
    folder, failures = location(folder), 0
    while True:
        remove_leftovers(folder)
        checkpoint = _checkpoint_to_go_on_from(folder)
        try:
            return _start_workers(recipe, folder, identity, checkpoint, follow)
        except TrainingFailedError as error:
            _raise_what_would_come_again(error)
            failures += not _is_preemption(error)
            if failures > recipe.max_failures:
                raise _gave_up(error, folder, failures) from None
            count(TRAIN_RESTARTS)
            print(f"train: {_what_happened(error)}; starting the workers again", flush=True)


def _checkpoint_to_go_on_from(folder: UPath) -> UPath | None:
    checkpoint, complaints = newest_healthy(folder)
    for complaint in complaints:
        print(f"train: damaged checkpoint passed over: {complaint}", flush=True)
    if checkpoint is not None:
        print(f"train: going on after step {progress_of(checkpoint)['step']}, from {checkpoint}", flush=True)
    elif complaints:
        print("train: no healthy checkpoint is left; training starts again at step 1", flush=True)
    return checkpoint


def _scaling(api: Any, recipe: TrainRecipe) -> Any:
    resources = {"CPU": recipe.cpus_per_worker(), **({"GPU": 1} if recipe.use_gpu else {})}
    return api.ScalingConfig(num_workers=recipe.num_workers, use_gpu=recipe.use_gpu, resources_per_worker=resources)


def _start_workers(
    recipe: TrainRecipe,
    folder: UPath,
    identity: dict[str, str],
    checkpoint: UPath | None,
    follow: Callable[[Record], None],
) -> dict[str, Any]:
    # The package picks between two generations of these classes when it is imported, which no type checker can follow.
    api: Any = importlib.import_module("ray.train")
    torch_api: Any = importlib.import_module("ray.train.torch")
    filesystem, path = arrow_filesystem(folder / CHECKPOINTS)
    with _followed(follow) as reports:
        trainer = torch_api.TorchTrainer(
            _worker,
            train_loop_config={
                "recipe": resolved(recipe),
                "folder": str(folder),
                "identity": identity,
                "checkpoint": str(checkpoint) if checkpoint else None,
                "reports": reports,
            },
            scaling_config=_scaling(api, recipe),
            torch_config=torch_api.TorchConfig(backend="cpu:gloo,cuda:nccl" if recipe.use_gpu else "gloo"),
            run_config=api.RunConfig(
                # Ray keeps a marker there and nothing else.
                storage_path=path,
                storage_filesystem=filesystem,
                name=".ray_train",
                failure_config=api.FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        )
        last = trainer.fit().return_value
    assert isinstance(last, dict)
    return last


class _Reports:
    """What the workers report, for the driver to fetch; an actor beside the driver."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def put(self, record: Record) -> None:
        self._records.append(record)

    def since(self, known: int) -> list[Record]:
        return self._records[known:]


@contextmanager
def _followed(follow: Callable[[Record], None]) -> Generator[Any]:
    """An actor that takes records; what it takes comes out here until the block ends."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    reports: Any = ray.remote(num_cpus=0)(_Reports).options(scheduling_strategy=here).remote()
    stop = threading.Event()

    def fetch() -> None:
        known, stopping = 0, False
        while not stopping:
            stopping = stop.wait(_FETCH_S)
            try:
                for record in ray.get(reports.since.remote(known), timeout=_ANSWER_S):
                    known += 1
                    follow(record)
            except GetTimeoutError:
                # A busy machine: they come with the next answer.
                continue
            except RayError:
                # Nobody sees more lines; they are on the storage, and the training goes on.
                return

    thread = threading.Thread(target=fetch, name="metrics", daemon=True)
    thread.start()
    try:
        yield reports
    finally:
        stop.set()
        thread.join()
        # Where the cluster is gone, so is the actor.
        with suppress(RayError, OSError, RuntimeError):
            ray.kill(reports)


class _RayContext:
    """A worker of Ray Train."""

    def __init__(self, device: torch.device, reports: Any) -> None:
        self.device = device
        self._reports = reports

    def report(self, record: Record) -> None:
        # Not waited for: if the actor is gone, nobody sees the line, and the training goes on.
        self._reports.put.remote(record)


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
    # On this machine: another one's cache is not seen here.
    recipe = recipe.model_copy(update={"base_model": str(model_folder(recipe.base_model))})
    context = _RayContext(device, config["reports"])
    return train_loop(context, recipe, config["folder"], config["identity"], config["checkpoint"])


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


def _gave_up(error: Exception, folder: UPath, failures: int) -> Exception:
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
