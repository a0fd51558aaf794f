"""The offline part: rows become documents in shards, and documents a plan. The driver holds lengths, never tokens."""

from __future__ import annotations

import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from janus_ray.chat import use_template
from janus_ray.errors import DataError, JanusError, TrainingError
from janus_ray.model_folder import load_tokenizer, save_tokenizer
from janus_ray.progress import ProgressLine
from janus_ray.store.files import delete_files, files_below, read_json, write_json
from janus_ray.store.hub import model_folder
from janus_ray.store.location import location
from janus_ray.store.shards import Index, TokenShards, damage, finish_shards, id_type, joined
from janus_ray.train.collection import BATCH_ROWS, Collection, Rows
from janus_ray.train.documents import DocumentWriter, Written, encode_row
from janus_ray.train.plan import DOCUMENTS_FOLDER, PLAN_FILE, Plan, make_plan, write_plan
from janus_ray.train.recipe import TrainRecipe

_COUNTS_FILE = "counts.json"

# Among thousands of rows one may be odd; where the template refuses a larger share of them it is the wrong one.
_MOST_REFUSED = 0.01
# The early look takes so many rows, and finds a template wrong by a share of them that chance does not make of 1 %.
_LOOKED_AT = 256
_MOST_REFUSED_OF_SOME = 0.1
# Batches that wait at each process: it never idles, and few are held at once.
_BATCHES_AHEAD = 2

Batches = Iterable[pa.Table]
WriteAll = Callable[[TrainRecipe, UPath, Batches, int], Iterator[Written]]
"""Makes a shard of each batch of rows: (recipe, folder, batches, how many) -> what became of them, in their order."""


def prepare(
    recipe: TrainRecipe, collection: Collection, folder: Path | UPath, write_all: WriteAll | None = None
) -> dict[str, Any]:
    """Writes `documents/` and `plan.npz` below the folder and returns what was done, in numbers.

    Args:
        recipe: what to do.
        collection: the rows.
        folder: the run's folder.
        write_all: who tokenises; None: `num_workers` processes of the Ray cluster.

    Raises:
        DataError: no row fits into a bin, the template refuses more than single rows, or the audit finds a wrong mask.
        CheckpointError: the base model has no usable tokenizer.
    """
    encoder = use_template(load_tokenizer(model_folder(recipe.base_model)), recipe.chat_template)
    documents = location(folder) / DOCUMENTS_FOLDER
    delete_files(files_below(documents))
    try:
        written = _write_documents(recipe, documents, collection.rows, write_all or in_ray)
        finish_shards(
            documents, [each.entry for each in written], id_type(len(encoder.tokenizer)), index := _index(written)
        )
        plan, too_long = plan_of(recipe, index)
    except JanusError:
        delete_files(files_below(documents))
        raise
    print(f"train: mask audit: {next(each.example for each in written if each.example)}", flush=True)
    write_plan(plan, location(folder) / PLAN_FILE)
    tokens = int(plan.per_bin(index.lengths).sum())
    counts = {
        **collection.counts,
        "rows_refused_by_template": sum(each.refused for each in written),
        "rows_too_long": too_long,
        "documents": plan.groups.size,
        "bins": len(plan.bins),
        "tokens": tokens,
        "supervised_tokens": int(plan.per_bin(index.supervised).sum()),
        "padding_share": round(1 - tokens / (len(plan.bins) * recipe.max_length), 4),
        "template_sha256": encoder.probe_sha256(),
        "documents_xxh3": TokenShards(documents).xxh3,
    }
    write_json(documents / _COUNTS_FILE, counts)
    return counts


def plan_of(recipe: TrainRecipe, index: Index) -> tuple[Plan, int]:
    """The plan over the rows that fit, and the number of rows that do not.

    Raises:
        DataError: none fits.
    """
    rows, starts = np.unique(index.rows, return_index=True)
    longest = np.maximum.reduceat(index.lengths, starts)
    fitting = np.isin(index.rows, rows[longest <= recipe.max_length])
    if not fitting.any():
        raise DataError(f"{recipe.collection}: none of {len(rows)} rows fits into {recipe.max_length} tokens")
    plan = make_plan(
        index.lengths,
        np.flatnonzero(fitting)[:, None],
        recipe.max_length,
        recipe.bins_per_step,
        recipe.epochs,
        recipe.max_steps,
        recipe.seed,
    )
    return plan, int((longest > recipe.max_length).sum())


def already_prepared(folder: Path | UPath) -> dict[str, Any] | None:
    """What `prepare` returned when it made this run's documents; None where it did not, or they are damaged."""
    documents = location(folder) / DOCUMENTS_FOLDER
    try:
        counts = read_json(documents / _COUNTS_FILE)
        whole = damage(documents) is None and counts["documents_xxh3"] == TokenShards(documents).xxh3
    except (JanusError, KeyError, TypeError):
        return None
    return counts if whole else None


def plan_again(recipe: TrainRecipe, folder: Path | UPath) -> None:
    """Writes the plan over documents that are there already; it takes seconds, and is the same."""
    folder = location(folder)
    write_plan(plan_of(recipe, TokenShards(folder / DOCUMENTS_FOLDER).index)[0], folder / PLAN_FILE)


def check_chat(recipe: TrainRecipe, rows: Rows | None) -> str:
    """Encodes some rows, and writes and reads the tokenizer as an export will.

    Single rows that the template refuses pass: `prepare` leaves them out.

    Args:
        recipe: names the base model and the template.
        rows: what is to be trained on; None where its documents are there already.

    Returns:
        The template's hash with this tokenizer.

    Raises:
        CheckpointError: the tokenizer cannot be used with this template, or an export of it could not be served.
        DataError: the template does not take such rows, or a mask is wrong.
    """
    from transformers import AutoConfig

    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    if rows is not None:
        # Not the first ones: files are often sorted by source. Always the same ones: a refusal can be repeated.
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(len(rows), _LOOKED_AT)))
        outcomes = [encode_row(encoder, messages) for messages in rows.take(chosen)]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, str)]
        most = _MOST_REFUSED if len(chosen) == len(rows) else _MOST_REFUSED_OF_SOME
        check_refusals(len(refusals), next(iter(refusals), ""), len(chosen), most, recipe)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.from_pretrained(recipe.base_model).save_pretrained(folder)
        save_tokenizer(encoder.tokenizer, Path(folder))
    return encoder.probe_sha256()


def check_refusals(refused: int, first: str, looked_at: int, most: float, recipe: TrainRecipe) -> None:
    """Raises where the template refuses every row, or more than one and more than the share `most` of those looked at.

    Raises:
        DataError: one line with the number, the first reason, and what takes such rows.
    """
    if refused == looked_at or refused > max(1, most * looked_at):
        advice = '; chat_template = "janus" takes them' if recipe.chat_template == "own" else ""
        raise DataError(
            f"{recipe.collection}: the chat template refuses {refused} of the {looked_at} rows looked at, "
            f"the first: {first}{advice}"
        )


def _write_documents(recipe: TrainRecipe, folder: UPath, rows: Rows, write_all: WriteAll) -> list[Written]:
    """The documents of all rows in shards; what became of each batch, in order."""
    progress = ProgressLine("train: rows tokenised", len(rows))
    written: list[Written] = []
    done = 0
    for each in write_all(recipe, folder, rows.batches(), -(-len(rows) // BATCH_ROWS)):
        written.append(each)
        done += each.rows
        progress.update(done)
    refused = sum(each.refused for each in written)
    first = next((each.first_refusal for each in written if each.refused), "")
    check_refusals(refused, first, len(rows), _MOST_REFUSED, recipe)
    if refused:
        shown = f"{refused} of {len(rows)} rows are left out, the first: {first}"
        print(f"train: refused by the chat template: {shown}", flush=True)
    return written


def _index(written: list[Written]) -> Index:
    """The index over all shards; rows count from the collection's first."""
    before = np.cumsum([0, *(each.rows for each in written)])
    return joined(
        Index(each.index.lengths, each.index.supervised, each.index.rows + first)
        for each, first in zip(written, before, strict=False)
    )


def in_this_process(recipe: TrainRecipe, folder: UPath, batches: Batches, count: int) -> Iterator[Written]:
    """Tokenises here, one batch after the other."""
    writer = DocumentWriter(recipe.base_model, recipe.chat_template, folder)
    return (writer.write(number, batch) for number, batch in enumerate(batches))


def in_ray(recipe: TrainRecipe, folder: UPath, batches: Batches, count: int) -> Iterator[Written]:
    """Tokenises in `num_workers` processes of the Ray cluster; few batches are held at once, whatever their number.

    Raises:
        JanusError: a process raised it.
        TrainingError: processes died again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    # A process that dies is started again, and does its batch again: a shard is written whole or not at all.
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3)(DocumentWriter)
    actors: list[Any] = [
        actor.remote(recipe.base_model, recipe.chat_template, folder) for _ in range(min(recipe.num_workers, count))
    ]
    waiting: deque[Any] = deque()
    try:
        for number, batch in enumerate(batches):
            waiting.append(actors[number % len(actors)].write.remote(number, batch))
            if len(waiting) == _BATCHES_AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except RayTaskError as error:
        if isinstance(error.cause, JanusError):
            raise error.cause from None
        raise
    except RayError as error:
        memory = " because a machine ran out of memory" if "OutOfMemory" in type(error).__name__ else ""
        raise TrainingError(
            f"{recipe.collection}: a process that tokenises died, also when it was started again{memory}; "
            "--if-exists resume begins with the rows anew"
        ) from None
    finally:
        for each in actors:
            ray.kill(each)
