"""The driver of a training run: prepare offline, start the workers, follow their metrics, finish the folder."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists, resolved
from janus_ray.errors import ConfigError, JanusError
from janus_ray.model_folder import load_tokenizer
from janus_ray.store.files import read_json, write_json
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.folder import OutputFolder, read_manifest
from janus_ray.store.tables import read_jsonl
from janus_ray.train.loop import METRICS_FILE, train_worker
from janus_ray.train.model import load_config
from janus_ray.train.prepare import prepare, usable_rows
from janus_ray.train.recipe import TrainRecipe

_RUN_NAME = "checkpoints"


def train(recipe: TrainRecipe, if_exists: IfExists) -> dict[str, Any]:
    """Runs the fine-tuning and returns its manifest.

    A run that was interrupted continues from its last checkpoint with `if_exists="resume"`.

    Raises:
        ConfigError, DataError, CheckpointError: the data, the base model, the folder or the cluster is not as it must
            be; found before any worker starts where possible.
    """
    # By its absolute path, because Ray's processes run in folders of their own; a hub id as it is.
    local = recipe.model_copy(update={"base_model": _absolute(recipe.base_model)})
    usable_rows(recipe.collection)
    load_config(recipe)
    load_tokenizer(recipe.base_model)
    folder = OutputFolder(recipe.output_dir, recipe, if_exists)
    inputs = {"collection": recipe.collection, "base_model": recipe.base_model}
    if folder.finished and not folder.finished_with(inputs):
        raise _made_from_other_inputs(folder.path)
    if folder.finished:
        print(f"{folder.path}: already finished")
        return read_manifest(folder.path)
    gpus = recipe.num_workers if recipe.use_gpu else 0
    purpose = f"train with {recipe.num_workers} workers"
    with ray_cluster(recipe.ray, recipe.num_workers + 1, purpose, needed_gpus=gpus):
        folder.begin()
        counts = _prepared(local, folder, inputs)
        print(
            f"train: {counts['rows']} rows, {counts['tokens']} tokens ({counts['supervised_tokens']} with loss) in "
            f"{counts['bins']} bins, {100 * counts['padding_share']:.1f} % padding, "
            f"{counts['rows_too_long']} rows too long; {recipe.num_workers} FSDP2 workers",
            flush=True,
        )
        with _followed(folder.path / METRICS_FILE):
            _fit(local, folder.path, counts["template_sha256"])
    last = read_jsonl(folder.path / METRICS_FILE)[-1]
    return _finish(folder, inputs, counts, last)


def _prepared(recipe: TrainRecipe, folder: OutputFolder, inputs: dict[str, str]) -> dict[str, Any]:
    """The packed data's counts; packed once, also when the run is resumed.

    Raises:
        ConfigError: the run to resume was packed from data, or started from a base model, that has changed since.
    """
    file = folder.path / "packed" / "inputs.json"
    now = {name: fingerprint(path) for name, path in inputs.items()}
    if file.is_file():
        if read_json(file) != now:
            raise _made_from_other_inputs(folder.path)
        return read_json(folder.path / "packed" / "counts.json")
    counts = prepare(recipe, folder.path)
    write_json(file, now)
    return counts


def _made_from_other_inputs(folder: Path) -> ConfigError:
    return ConfigError(
        f"output folder {folder} belongs to other data or another base model than there are now; "
        "choose another folder or --if-exists overwrite"
    )


def _fit(recipe: TrainRecipe, folder: Path, template_sha256: str) -> None:
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # The package picks between two generations of these classes when it is imported, which no type checker can follow.
    api: Any = importlib.import_module("ray.train")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": resolved(recipe),
            "folder": str(folder.absolute()),
            "template_sha256": template_sha256,
        },
        scaling_config=api.ScalingConfig(num_workers=recipe.num_workers, use_gpu=recipe.use_gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if recipe.use_gpu else "gloo"),
        run_config=api.RunConfig(
            # The same path and name find the checkpoints of an interrupted run.
            storage_path=str(folder.absolute()),
            name=_RUN_NAME,
            failure_config=api.FailureConfig(max_failures=recipe.max_failures),
            checkpoint_config=api.CheckpointConfig(num_to_keep=recipe.keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, JanusError):
                raise cause from None
        raise


def _absolute(base_model: str) -> str:
    return str(Path(base_model).absolute()) if Path(base_model).is_dir() else base_model


def _finish(
    folder: OutputFolder, inputs: dict[str, str], counts: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    manifest = folder.finish(
        inputs=inputs,
        counts={**counts, "steps": last["step"], "final_loss": last["loss"]},
        template_sha256=counts["template_sha256"],
    )
    print(f"train: {last['step']} steps, loss {last['loss']:.4f} -> {folder.path / 'model'}")
    return manifest


@contextmanager
def _followed(metrics: Path) -> Generator[None]:
    """Prints each line that the workers add to the metrics file while the block runs."""
    stop = threading.Event()
    already = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    thread = threading.Thread(target=_follow, args=(metrics, already, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(metrics: Path, printed: int, stop: threading.Event) -> None:
    while True:
        stopping = stop.is_set()
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        # A restart drops lines; what it does again is printed again.
        for line in lines[min(printed, len(lines)) :]:
            _print_step(json.loads(line))
        printed = len(lines)
        if stopping:
            return
        time.sleep(0.5)


def _print_step(record: dict[str, Any]) -> None:
    mfu = f", MFU {100 * record['mfu']:.1f} %" if record["mfu"] is not None else ""
    print(
        f"step {record['step']:>5}/{record['num_steps']}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
        f"grad {record['grad_norm']:.2f}  {record['tokens_per_s']:.0f} tokens/s{mfu}  "
        f"padding {100 * record['padding_share']:.1f} %",
        flush=True,
    )
