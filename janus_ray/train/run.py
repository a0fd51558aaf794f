"""The driver of a training run: prepare offline, start the workers, follow their metrics, finish the folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.errors import ConfigError
from janus_ray.store.files import read_json, write_json
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.folder import OutputFolder, read_manifest
from janus_ray.store.hub import model_folder
from janus_ray.train.checkpoint import remove_leftovers
from janus_ray.train.launch import fit
from janus_ray.train.loop import METRICS_FILE
from janus_ray.train.model import check_base_model
from janus_ray.train.prepare import check_chat, prepare, usable_rows
from janus_ray.train.recipe import TrainRecipe


def train(recipe: TrainRecipe, if_exists: IfExists) -> dict[str, Any]:
    """Runs the fine-tuning and returns its manifest.

    A run that was interrupted continues from its last checkpoint with `if_exists="resume"`.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: the data, the base model, the folder or the cluster is
            not as it must be, found before Ray starts where possible; or the run cannot go on.
    """
    folder = OutputFolder(recipe.output_dir, recipe, if_exists)
    inputs = {"collection": recipe.collection, "base_model": recipe.base_model}
    if folder.finished and not folder.finished_with(inputs):
        raise _made_from_other_inputs(folder.path)
    if folder.finished:
        print(f"{folder.path}: already finished")
        return read_manifest(folder.path)
    # By its absolute path, because Ray's processes run in folders of their own; of a published model its snapshot.
    local = recipe.model_copy(update={"base_model": str(model_folder(recipe.base_model).absolute())})
    rows = usable_rows(recipe.collection)
    check_base_model(local)
    check_chat(local, rows)
    gpus = recipe.num_workers if recipe.use_gpu else 0
    purpose = f"train with {recipe.num_workers} workers"
    with ray_cluster(recipe.ray, recipe.num_workers + 1, purpose, needed_gpus=gpus):
        folder.begin()
        remove_leftovers(folder.path)
        counts = _prepared(local, folder, inputs)
        print(
            f"train: {counts['rows']} rows, {counts['tokens']} tokens ({counts['supervised_tokens']} with loss) in "
            f"{counts['bins']} bins, {100 * counts['padding_share']:.1f} % padding, "
            f"{counts['rows_too_long']} rows too long; {recipe.num_workers} FSDP2 workers",
            flush=True,
        )
        with _followed(folder.path / METRICS_FILE):
            last = fit(local, folder.path.absolute(), {"template_sha256": counts["template_sha256"]})
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
    thread = threading.Thread(target=_follow, args=(metrics, len(_whole_lines(metrics)), stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(metrics: Path, printed: int, stop: threading.Event) -> None:
    while True:
        stopping = stop.is_set()
        lines = _whole_lines(metrics)
        # A restart drops lines; what it does again is printed again.
        for line in lines[min(printed, len(lines)) :]:
            _print_step(json.loads(line))
        printed = len(lines)
        if stopping:
            return
        time.sleep(0.5)


def _whole_lines(metrics: Path) -> list[str]:
    """The lines that are written to their end."""
    text = metrics.read_text() if metrics.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _print_step(record: dict[str, Any]) -> None:
    mfu = f", MFU {100 * record['mfu']:.1f} %" if record["mfu"] is not None else ""
    print(
        f"step {record['step']:>5}/{record['num_steps']}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
        f"grad {record['grad_norm']:.2f}  {record['tokens_per_s']:.0f} tokens/s{mfu}  "
        f"padding {100 * record['padding_share']:.1f} %",
        flush=True,
    )
