"""Collecting the data: instructions in, a folder of Parquet in the Multifaceted Collection's schema out.

Instructions stream from the sources through client processes into files; the driver holds a few at a time. What keeps
an endpoint's limit full: docs/decisions/0004-collect-in-one-pass.md and 0017-one-fan-out.md.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

from janus_ray.cluster import ray_cluster
from janus_ray.config import IfExists
from janus_ray.data.client import AnnotatingClient
from janus_ray.data.recipe import CollectRecipe
from janus_ray.data.row_files import RowFiles, made_with, unfinished
from janus_ray.data.sources import Instructions, read_instructions
from janus_ray.errors import GenerationError
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.llm.fanout import fan_out
from janus_ray.progress import ProgressLine
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder, read_manifest


def collect(recipe: CollectRecipe, if_exists: IfExists) -> dict[str, Any]:
    """Runs the collection and returns its manifest.

    Every finished request is in the ledger of the output folder before its row moves on: after a crash, or to try
    failed rows again, `if_exists="resume"` asks only for what is missing.

    Args:
        recipe: what to do.
        if_exists: see store.RunFolder.

    Raises:
        ConfigError, DataError: a source, the endpoint, the folder or the cluster is not as it must be.
        GenerationError: not one row succeeded; the folder stays unfinished and can be resumed.
    """
    instructions, source_counts = read_instructions(recipe.sources)
    with closing(instructions):
        return _collect(recipe, if_exists, instructions, source_counts)


def _collect(
    recipe: CollectRecipe, if_exists: IfExists, instructions: Instructions, source_counts: dict[str, int]
) -> dict[str, Any]:
    folder = RunFolder(recipe.output_dir, recipe, if_exists)
    inputs = {f"source_{index}": Ref.of(source.path) for index, source in enumerate(recipe.sources)}
    folder.check_inputs(inputs)
    asked = None
    if folder.finished and (before := folder.recorded().get("teacher")) and before.revision != UNKNOWN:
        # Made by weights that are known: a teacher that was retrained under its name makes another collection.
        asked = _asked(recipe.teacher, inputs)
        folder.check_inputs(inputs)
    if folder.finished:
        manifest = read_manifest(folder.path)
        if not manifest["counts"]["rows_failed"]:
            print(f"{folder.path}: already finished, {manifest['counts']['rows_ok']} rows; 0 requests sent")
            return manifest
        print(f"{folder.path}: trying {manifest['counts']['rows_failed']} failed rows again")
    teacher = asked or _asked(recipe.teacher, inputs)
    folder.check_inputs(inputs, whole=True)
    print(f"collect: {len(instructions)} instructions x {recipe.num_sets} preference sets from {teacher.model}")
    with ray_cluster(recipe.ray, recipe.client_actors, f"collect with {recipe.client_actors} client actors"):
        folder.begin(inputs)
        rows = RowFiles(folder.path, made_with(recipe, teacher), recipe.rows_per_file, folder.check_held)
        _add_rows(rows, instructions, rows.keep(instructions, recipe.num_sets), recipe, teacher, folder)
    if not rows.counts["rows_ok"]:
        raise GenerationError(
            f"teacher: {teacher.url}: all {rows.counts['rows_failed']} rows failed, the first with: "
            f"{rows.first_failure}"
        )
    counts = {name: rows.counts[name] for name in sorted(rows.counts)}
    done = {"instructions": len(instructions), **counts, "failures": dict(rows.failures), "files": rows.files}
    manifest = folder.finish(counts={**source_counts, **done})
    _print_summary(manifest["counts"], folder.path)
    return manifest


def _add_rows(
    rows: RowFiles,
    instructions: Instructions,
    done: np.ndarray,
    recipe: CollectRecipe,
    teacher: ReachedEndpoint,
    folder: RunFolder,
) -> None:
    """Makes the rows of all instructions that are not done, and writes them as they come."""
    total = len(instructions) * recipe.num_sets
    if rows.num_rows:
        print(f"collect: {rows.num_rows} of {total} rows are there", flush=True)
    progress = ProgressLine("collect: rows", total)
    for name in ("rows_ok", "rows_failed", "requests_sent"):
        rows.counts[name] += 0
    made = fan_out(
        unfinished(instructions, done),
        AnnotatingClient,
        (recipe.model_dump(mode="json"),),
        teacher,
        folder.path / "ledger",
        recipe.client_actors,
    )
    for _, table in made:
        rows.counts["requests_sent"] += sum(table["sent"].to_pylist())
        rows.add(table)
        progress.update(
            rows.num_rows, f"{rows.counts['requests_sent']} requests sent", failed=rows.counts["rows_failed"]
        )
    rows.close()


def _asked(teacher: Endpoint, inputs: dict[str, Ref]) -> ReachedEndpoint:
    """The teacher as it answers now, whose weights are an input of the collection."""
    reached = teacher.reached(check_endpoint(teacher, "teacher"))
    inputs["teacher"] = Ref(f"{teacher.address} {teacher.model}", reached.weights_id or UNKNOWN)
    return reached


def _print_summary(counts: dict[str, Any], folder: object) -> None:
    failed = "".join(f", {number} {kind}" for kind, number in counts["failures"].items())
    print(
        f"collect: {counts['rows_ok']} rows ok, {counts['rows_failed']} failed{failed}; "
        f"{counts['requests_sent']} requests sent, {counts['completion_tokens']} tokens written -> {folder}"
    )
