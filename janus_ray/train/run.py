"""The driver of a training run: prepare offline, start the workers, follow their metrics, finish the folder."""

from __future__ import annotations

from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.errors import TrainingError
from janus_ray.progress import ProgressLine, report_step
from janus_ray.store.files import files_below
from janus_ray.store.folder import Ref, RunFolder, read_manifest
from janus_ray.store.hub import cached_commit, hub_id, model_folder
from janus_ray.store.location import location
from janus_ray.train.collection import left_out, read_collection
from janus_ray.train.context import Record
from janus_ray.train.launch import fit
from janus_ray.train.model import check_base_model
from janus_ray.train.plan import DOCUMENTS_FOLDER
from janus_ray.train.prepare import already_prepared, check_chat, plan_again, prepare
from janus_ray.train.recipe import TrainRecipe

_LARGEST_LEARNING_RATE = 1.0


def train(recipe: TrainRecipe, if_exists: IfExists) -> dict[str, Any]:
    """Runs the fine-tuning and returns its manifest.

    A run that was interrupted continues from its last checkpoint with `if_exists="resume"`.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: the data, the base model, the folder or the cluster is
            not as it must be, found before Ray starts where possible; or the run cannot go on.
    """
    _check_learning_rate(recipe)
    folder = RunFolder(recipe.output_dir, recipe, if_exists)
    where = folder.path
    if folder.finished:
        folder.check_inputs(_inputs(recipe))
        print(f"{folder.path}: already finished")
        return read_manifest(folder.path)
    local = recipe.model_copy(update={"base_model": str(model_folder(recipe.base_model).absolute())})
    check_base_model(local)
    counts = _prepared_before(folder)
    collection = None if counts else read_collection(recipe.collection)
    template_sha256 = check_chat(local, collection.rows if collection else None)
    # Looked at after they are read: what is published is fetched by that, perhaps in a newer revision.
    inputs = {**_inputs(recipe), "chat_template": Ref(recipe.chat_template, template_sha256)}
    folder.check_inputs(inputs, whole=True)
    gpus = recipe.num_workers if recipe.use_gpu else 0
    purpose = f"train with {recipe.num_workers} workers"
    cpus = recipe.num_workers * recipe.cpus_per_worker() + 1
    with ray_cluster(recipe.ray, cpus, purpose, needed_gpus=gpus):
        folder.begin(inputs)
        elsewhere = recipe.model_copy(update={"base_model": reference_anywhere(recipe.base_model)})
        if collection is not None:
            counts = prepare(elsewhere, collection, where.absolute())
        else:
            plan_again(recipe, where)
        assert counts is not None
        _print_data(counts, recipe)
        identity = {name: counts[name] for name in ("template_sha256", "documents_xxh3")}
        last = fit(elsewhere, where.absolute(), identity, StepLines())
    return _finish(folder, counts, last)


def _inputs(recipe: TrainRecipe) -> dict[str, Ref]:
    return {"collection": Ref.of(recipe.collection), "base_model": Ref.of(recipe.base_model)}


def reference_anywhere(base_model: str) -> str:
    """The base model as a process on any machine finds it: what is published by its commit, a folder by its whole path.

    On a file system that other machines do not see, they do not find it.
    """
    published = hub_id(base_model)
    if published is not None:
        commit = cached_commit("model", published)
        return f"{published.name}@{commit}" if commit else base_model
    return str(location(base_model).absolute())


def _check_learning_rate(recipe: TrainRecipe) -> None:
    """Some rates leave finite weights, a loss that looks like one, and no model.

    Raises:
        TrainingError: the rate is beyond anything that trains.
    """
    if recipe.learning_rate > _LARGEST_LEARNING_RATE:
        raise TrainingError(
            f"learning_rate = {recipe.learning_rate:g}: stopped before step 1, as AdamW moves every weight by about "
            f"as much in a step, and no loss stays finite or means anything; at most {_LARGEST_LEARNING_RATE:g}"
        )


def _prepared_before(folder: RunFolder) -> dict[str, Any] | None:
    """The counts of the documents of the run to resume; None where there are none that can be used."""
    if not folder.resumes or not files_below(folder.path / DOCUMENTS_FOLDER):
        return None
    counts = already_prepared(folder.path)
    if counts is None:
        print(f"train: {folder.path / DOCUMENTS_FOLDER} is damaged and is made again", flush=True)
    return counts


def _print_data(counts: dict[str, Any], recipe: TrainRecipe) -> None:
    # A run that an earlier version packed has no such counts.
    rows = counts["rows"] - counts["rows_too_long"] - counts.get("rows_refused_by_template", 0)
    documents = counts.get("documents", rows)
    shown = f"{rows} rows" if documents == rows else f"{rows} rows in {documents} documents"
    print(
        f"train: {shown} ({counts['rows_without_system']} have no system message); "
        f"left out: {left_out(counts) or 'none'}",
        flush=True,
    )
    print(
        f"train: {counts['tokens']} tokens ({counts['supervised_tokens']} with loss) in {counts['bins']} bins, "
        f"{100 * counts['padding_share']:.1f} % padding; {recipe.num_workers} FSDP2 workers",
        flush=True,
    )


def _finish(folder: RunFolder, counts: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    manifest = folder.finish(
        counts={**counts, "steps": last["step"], "final_loss": last["loss"]},
        template_sha256=counts["template_sha256"],
    )
    print(f"train: {last['step']} steps, loss {last['loss']:.4f} -> {folder.path / 'model'}")
    return manifest


class StepLines:
    """Prints each line of metrics, with the time left; what a restart does again is printed again."""

    def __init__(self) -> None:
        """Nothing is known before the first line."""
        self._progress: ProgressLine | None = None

    def __call__(self, record: Record) -> None:
        """Prints one."""
        self._progress = self._progress or ProgressLine("train: step", record["num_steps"])
        report_step(self._progress, record)
