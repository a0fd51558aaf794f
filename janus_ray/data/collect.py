"""Collecting the data: instructions in, a folder of Parquet in the Multifaceted Collection's schema out.

Ray Data streams instructions through asynchronous client actors. What keeps an endpoint's limit full (measured:
docs/decisions/0004-collect-in-one-pass.md): the actor takes several times more instructions than requests may be in
flight, and a gate inside the client, not Ray Data's batches, holds the requests to the limit.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from upath import UPath

from janus_ray.cluster import quiet_ray_data, ray_cluster
from janus_ray.config import IfExists
from janus_ray.data.annotate import Annotator
from janus_ray.data.recipe import CollectRecipe
from janus_ray.data.sources import read_instructions
from janus_ray.errors import DataError, GenerationError
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.progress import ProgressLine
from janus_ray.records import COLLECTION, INSTRUCTIONS, Instruction
from janus_ray.store.files import delete_files, files_below
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder, read_manifest
from janus_ray.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    import ray.data

_BLOCK_ROWS = 64
_BATCH_ROWS = 16
# Ray Data hands an actor call at most four batches at a time, so one call admits a whole block.
_ADMITTED_PER_REQUEST_SLOT = 4

# Beside each row: the requests made for it just now; beside the first of a batch, what a person should know, and what
# ends the job (Ray Data does not let an exception through as what it is).
_BESIDE = [("sent", pa.int64()), ("notices", pa.list_(pa.string())), ("fatal", pa.string())]
_ANNOTATED = pa.schema([*COLLECTION, *(pa.field(name, kind) for name, kind in _BESIDE)])


class AnnotateInstructions:
    """The Ray Data actor around an `Annotator`: batches of instructions in, rows of the collection out."""

    def __init__(self, recipe: dict[str, Any], teacher: dict[str, Any], ledger: str, max_concurrency: int) -> None:
        """Keeps what is needed; ledger and client are opened inside the event loop, with the first batch."""
        self._recipe = CollectRecipe.model_validate(recipe)
        self._teacher = ReachedEndpoint.model_validate(teacher)
        self._ledger = ledger
        self._max_concurrency = max_concurrency
        self._annotator: Annotator | None = None
        # As many instructions at work as requests may be in flight: each always has one to send, and rows are
        # finished one after another instead of all at the end.
        self._at_work = asyncio.Semaphore(max_concurrency)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Annotates a batch of instructions and yields their rows."""
        try:
            if self._annotator is None:
                client = ChatClient(self._teacher, Ledger(self._ledger), max_concurrency=self._max_concurrency)
                self._annotator = Annotator(client, self._recipe)
            finished = await asyncio.gather(*(self._rows(self._annotator, row) for row in batch.to_pylist()))
            rows = [row for rows in finished for row in rows]
            rows[0]["notices"] = self._annotator.client.take_notices()
        except DataError as error:
            rows = [{"fatal": str(error)}]
        # The explicit schema keeps a column that is empty in this batch from losing its type.
        yield pa.Table.from_pylist(rows, schema=_ANNOTATED)

    async def _rows(self, annotator: Annotator, row: dict[str, str]) -> list[dict[str, Any]]:
        async with self._at_work:
            return await annotator.rows(Instruction(**row))


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
    with ray_cluster(recipe.ray, recipe.client_actors + 1, f"collect with {recipe.client_actors} client actors"):
        folder.begin(inputs)
        delete_files(found for found in files_below(folder.path, deep=False) if found.name.startswith("part-"))
        counts = _write_rows(_annotated(instructions, recipe, teacher, folder.path), recipe, folder.path, instructions)
    if not counts["rows_ok"]:
        reason = next(filter(None, read_parquet(folder.path, ["error_message"])["error_message"].to_pylist()))
        raise GenerationError(
            f"teacher: {teacher.url}: all {counts['rows_failed']} rows failed, the first with: {reason}"
        )
    manifest = folder.finish(
        counts={**source_counts, "instructions": len(instructions), **counts},
    )
    _print_summary(manifest["counts"], folder.path)
    return manifest


def _asked(teacher: Endpoint, inputs: dict[str, Ref]) -> Endpoint:
    """The teacher as it answers now, whose weights are an input of the collection."""
    reached = teacher.reached(check_endpoint(teacher, "teacher"))
    inputs["teacher"] = Ref(f"{teacher.address} {teacher.model}", reached.weights_id or UNKNOWN)
    return reached


def _annotated(
    instructions: list[Instruction], recipe: CollectRecipe, teacher: Endpoint, folder: UPath
) -> ray.data.Dataset:
    """The lazy dataset of annotated rows, in the order in which they are finished."""
    import ray.data

    quiet_ray_data()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A paid endpoint may answer nothing for a long time (Retry-After); our own limits say when to stop.
    context.execution_no_progress_timeout_s = -1

    table = pa.Table.from_pylist([asdict(instruction) for instruction in instructions], schema=INSTRUCTIONS)
    share = math.ceil(teacher.max_concurrency / recipe.client_actors)
    calls = max(8, math.ceil(_ADMITTED_PER_REQUEST_SLOT * share / _BLOCK_ROWS))
    return (
        ray.data.from_arrow(table)
        .repartition(max(1, math.ceil(len(instructions) / _BLOCK_ROWS)))
        .map_batches(
            AnnotateInstructions,
            fn_constructor_args=(
                recipe.model_dump(mode="json"),
                teacher.model_dump(mode="json"),
                str((folder / "ledger").absolute()),
                share,
            ),
            batch_size=_BATCH_ROWS,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=recipe.client_actors, max_concurrent_calls_per_actor=calls),
            num_cpus=1,
            zero_copy_batch=True,
        )
    )


def _write_rows(
    dataset: ray.data.Dataset, recipe: CollectRecipe, folder: UPath, instructions: list[Instruction]
) -> dict[str, Any]:
    """Writes the rows as they come, whole files at a time, and counts them."""
    progress = ProgressLine("collect: rows", len(instructions) * recipe.num_sets)
    pending: list[pa.Table] = []
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    files = 0
    said: set[str] = set()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert isinstance(batch, pa.Table)
        if fatal := next(filter(None, batch["fatal"].to_pylist()), None):
            raise DataError(fatal)
        counts["requests_sent"] += sum(batch["sent"].to_pylist())
        for name in ("attempts", "prompt_tokens", "completion_tokens"):
            counts[name] += sum(batch[name].to_pylist())
        statuses = batch["status"].to_pylist()
        counts["rows_ok"] += statuses.count("ok")
        counts["rows_failed"] += statuses.count("error")
        failures.update(kind for kind in batch["error_kind"].to_pylist() if kind)
        # Each client process finds the same out for itself.
        for notice in {line for lines in batch["notices"].to_pylist() for line in lines or ()} - said:
            print(notice, flush=True)
            said.add(notice)
        pending.append(batch.drop_columns([name for name, _ in _BESIDE]))
        done = counts["rows_ok"] + counts["rows_failed"]
        for table in _full_files(pending, recipe.rows_per_file, last=done == len(instructions) * recipe.num_sets):
            write_parquet(folder / f"part-{files:05d}.parquet", table)
            files += 1
        progress.update(done, f"{counts['requests_sent']} requests sent", failed=counts["rows_failed"])
    return {**{name: counts[name] for name in sorted(counts)}, "failures": dict(failures), "files": files}


def _full_files(pending: list[pa.Table], rows_per_file: int, *, last: bool) -> Iterator[pa.Table]:
    """Takes whole files' worth of rows off the pending tables; with the last rows, what remains."""
    while pending and (last or sum(map(len, pending)) >= rows_per_file):
        table = pa.concat_tables(pending).cast(COLLECTION)
        pending.clear()
        if len(table) > rows_per_file:
            pending.append(table.slice(rows_per_file))
        # Rows arrive in the order of their answers; inside a file the order is that of their ids.
        yield table.slice(0, rows_per_file).sort_by([("prompt_id", "ascending"), ("set_index", "ascending")])


def _print_summary(counts: dict[str, Any], folder: UPath) -> None:
    failed = "".join(f", {number} {kind}" for kind, number in counts["failures"].items())
    print(
        f"collect: {counts['rows_ok']} rows ok, {counts['rows_failed']} failed{failed}; "
        f"{counts['requests_sent']} requests sent, {counts['completion_tokens']} tokens written -> {folder}"
    )
