"""The offline part: render, tokenise and mask with Ray Data, then pack into Parquet that workers read by index."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from janus_ray.chat import ChatEncoder, ChatTemplate, EncodedExample, Message, loss_stretches, use_template
from janus_ray.cluster import quiet_ray_data
from janus_ray.errors import DataError
from janus_ray.model_folder import load_tokenizer, save_tokenizer
from janus_ray.store.files import read_json, write_json
from janus_ray.store.tables import write_parquet
from janus_ray.text import one_line
from janus_ray.train.collection import Collection
from janus_ray.train.packing import pack
from janus_ray.train.recipe import TrainRecipe

PACKED = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        # 1 where the token carries loss
        ("loss_mask", pa.list_(pa.uint8())),
        ("document_lengths", pa.list_(pa.int32())),
        ("num_supervised", pa.int32()),
    ]
)
# Small row groups: a worker reads single bins, in the plan's order.
ROW_GROUP_BINS = 16
PACKED_FOLDER = "packed"
BINS_FILE = "bins.parquet"
_COUNTS_FILE = "counts.json"

# One row for each of the collection's: the documents that it becomes, the tokens of the longest; or why it is none.
_ENCODED = pa.schema(
    [
        ("input_ids", pa.list_(pa.list_(pa.int32()))),
        ("loss_mask", pa.list_(pa.list_(pa.uint8()))),
        ("longest", pa.int64()),
        ("refusal", pa.string()),
    ]
)
# Among thousands of rows one may be odd; where the template refuses a larger share of them it is the wrong one.
_MOST_REFUSED = 0.01
# The early look takes so many rows, and finds a template wrong by a share of them that chance does not make of 1 %.
_LOOKED_AT = 256
_MOST_REFUSED_OF_SOME = 0.1
_ROWS_PER_BLOCK = 1024
_SHOWN_CHARACTERS = 60


def prepare(recipe: TrainRecipe, collection: Collection, folder: Path) -> dict[str, Any]:
    """Writes `packed/bins.parquet` below the folder and returns what was done, in numbers.

    Raises:
        DataError: no row fits into a bin, the template refuses more than single rows, or the audit finds a wrong mask.
        CheckpointError: the base model has no usable tokenizer.
    """
    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    encoded = _encode(collection.rows, recipe)
    refusals = [refusal for refusal in encoded["refusal"].to_pylist() if refusal]
    check_refusals(refusals, len(encoded), _MOST_REFUSED, recipe)
    if refusals:
        shown = f"{len(refusals)} of {len(encoded)} rows are left out, the first: {refusals[0]}"
        print(f"train: refused by the chat template: {shown}", flush=True)
    taken = encoded.filter(_mask(not refusal for refusal in encoded["refusal"].to_pylist()))
    fitting = taken.filter(_mask(longest <= recipe.max_length for longest in taken["longest"].to_pylist()))
    if not len(fitting):
        raise DataError(f"{recipe.collection}: none of {len(taken)} rows fits into {recipe.max_length} tokens")
    documents = _documents(fitting)
    packed = _packed_table(documents, recipe.max_length)
    audit_masks(packed, encoder)
    write_parquet(folder / PACKED_FOLDER / BINS_FILE, packed, ROW_GROUP_BINS)
    supervised, tokens = sum(packed["num_supervised"].to_pylist()), sum(_lengths(packed))
    counts = {
        **collection.counts,
        "rows_refused_by_template": len(refusals),
        "rows_too_long": len(taken) - len(fitting),
        "documents": len(documents),
        "bins": len(packed),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "padding_share": round(1 - tokens / (len(packed) * recipe.max_length), 4),
        "template_sha256": encoder.probe_sha256(),
        "packed_xxh3": _content_hash(packed),
    }
    write_json(folder / PACKED_FOLDER / _COUNTS_FILE, counts)
    return counts


def already_packed(folder: Path) -> dict[str, Any] | None:
    """What `prepare` returned when it packed this run's data; None where it did not, or its files are damaged."""
    try:
        counts = read_json(folder / PACKED_FOLDER / _COUNTS_FILE)
        packed = pq.read_table(folder / PACKED_FOLDER / BINS_FILE)
        return counts if counts["packed_xxh3"] == _content_hash(packed) else None
    except (DataError, OSError, KeyError, TypeError, pa.ArrowException):
        return None


def check_chat(recipe: TrainRecipe, rows: pa.Table | None) -> str:
    """Encodes some rows, and writes and reads the tokenizer as an export will.

    Single rows that the template refuses pass: `prepare` leaves them out.

    Args:
        recipe: names the base model and the template.
        rows: what is to be trained on; None where it is packed already.

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
        outcomes = [_encoded(encoder, messages) for messages in rows["messages"].take(chosen).to_pylist()]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, str)]
        check_refusals(
            refusals, len(chosen), _MOST_REFUSED if len(chosen) == len(rows) else _MOST_REFUSED_OF_SOME, recipe
        )
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.from_pretrained(recipe.base_model).save_pretrained(folder)
        save_tokenizer(encoder.tokenizer, Path(folder))
    return encoder.probe_sha256()


def check_refusals(refusals: list[str], looked_at: int, most: float, recipe: TrainRecipe) -> None:
    """Raises where the template refuses every row, or more than one and more than the share `most` of those looked at.

    Raises:
        DataError: one line with the number, the first reason, and what takes such rows.
    """
    if len(refusals) == looked_at or len(refusals) > max(1, most * looked_at):
        advice = '; chat_template = "janus" takes them' if recipe.chat_template == "own" else ""
        raise DataError(
            f"{recipe.collection}: the chat template refuses {len(refusals)} of the {looked_at} rows looked at, "
            f"the first: {refusals[0]}{advice}"
        )


def audit_masks(packed: pa.Table, encoder: ChatEncoder) -> str:
    """Looks at every document before the first step, and prints what carries loss in one of them.

    A wrong mask trains the wrong thing without any error, so this is a gate and not a log line.

    Returns:
        The printed example, its part with loss in brackets.

    Raises:
        DataError: a document does not start as prompts do, does not end under loss, or has a stretch of loss in which
            the token that ends an answer does not stand at the end and only there.
    """
    shown, decode = "", encoder.tokenizer.decode
    for row in packed.to_pylist():
        start = 0
        for length in row["document_lengths"]:
            ids, mask = row["input_ids"][start : start + length], row["loss_mask"][start : start + length]
            start += length
            stretches = loss_stretches(mask)
            first, last = (stretches[0][0], stretches[-1][1]) if stretches else (length, 0)
            ends = all(_ends(ids[begin:end], encoder.end_id) for begin, end in stretches)
            if encoder.begin_id not in (None, ids[0]) or not 0 < first < last == length or not ends:
                raise DataError(f"mask audit: a document is wrong: {decode(ids)!r}, loss from token {first}")
            if not shown:
                starts = [0, *(end for _, end in stretches)]
                shown = " + ".join(
                    f"{decode(ids[before:begin])!r} + loss on {decode(ids[begin:end])!r}"
                    for before, (begin, end) in zip(starts, stretches, strict=False)
                )
    print(f"train: mask audit: {shown}", flush=True)
    return shown


def _ends(stretch: list[int], end_id: int | None) -> bool:
    return stretch[-1] == end_id and end_id not in stretch[:-1]


def _encode(rows: pa.Table, recipe: TrainRecipe) -> pa.Table:
    """The documents of all rows, in the rows' order; for a row that the template refuses the reason."""
    import ray
    import ray.data

    quiet_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    blocks = max(1, len(rows) // _ROWS_PER_BLOCK)
    encoded = ray.data.from_arrow(rows, override_num_blocks=blocks).map_batches(
        _EncodeRows,
        fn_constructor_args=(recipe.base_model, recipe.chat_template),
        batch_format="pyarrow",
        batch_size=1024,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=recipe.num_workers),
        num_cpus=1,
    )
    tables = [table for table in ray.get(encoded.to_arrow_refs()) if len(table)]
    return pa.concat_tables(tables).cast(_ENCODED)


class _EncodeRows:
    """Ray Data actor: rows of text in, token ids and loss masks out."""

    def __init__(self, base_model: str, chat_template: ChatTemplate) -> None:
        self._encoder = use_template(load_tokenizer(base_model), chat_template)

    def __call__(self, batch: pa.Table) -> pa.Table:
        encoded = [_encoded(self._encoder, messages) for messages in batch["messages"].to_pylist()]
        return pa.Table.from_pylist([_encoded_row(each) for each in encoded], schema=_ENCODED)


def _encoded_row(encoded: list[EncodedExample] | str) -> dict[str, Any]:
    if isinstance(encoded, str):
        return {"refusal": encoded}
    return {
        "input_ids": [example.input_ids for example in encoded],
        "loss_mask": [[int(loss) for loss in example.loss_mask] for example in encoded],
        "longest": max(len(example.input_ids) for example in encoded),
    }


def _encoded(encoder: ChatEncoder, messages: list[Message]) -> list[EncodedExample] | str:
    """A row as training examples, compared with the row; or why the template refuses it, with its prompt's beginning.

    Raises:
        DataError: a mask is wrong.
    """
    prompt = next(message["content"] for message in messages if message["role"] == "user")
    row = f"row with the prompt {prompt[:_SHOWN_CHARACTERS]!r}"
    try:
        examples = encoder.encode_conversation(messages)
    except DataError as error:
        return f"{row}: {one_line(str(error))}"
    try:
        encoder.audit_conversation(examples, messages)
    except DataError as error:
        raise DataError(f"{row}: {error}") from None
    return examples


def _documents(encoded: pa.Table) -> pa.Table:
    """The documents of all rows one below the other: token ids and loss masks."""
    names = ("input_ids", "loss_mask")
    return pa.table({name: pc.call_function("list_flatten", [encoded[name]]) for name in names})


def _packed_table(documents: pa.Table, max_length: int) -> pa.Table:
    ids, masks = documents["input_ids"].to_pylist(), documents["loss_mask"].to_pylist()
    bins = pack([len(document) for document in ids], max_length)
    rows = [
        {
            "input_ids": [token for index in members for token in ids[index]],
            "loss_mask": [loss for index in members for loss in masks[index]],
            "document_lengths": [len(ids[index]) for index in members],
            "num_supervised": sum(sum(masks[index]) for index in members),
        }
        for members in bins
    ]
    return pa.Table.from_pylist(rows, schema=PACKED)


def _content_hash(packed: pa.Table) -> str:
    """Hash of every token, mask and length, whatever file holds them."""
    digest = xxhash.xxh3_128()
    for column in packed.select(PACKED.names).columns:
        nested = pa.types.is_list(column.type)
        lengths = [pc.call_function("list_value_length", [column])] if nested else []
        values = pc.call_function("list_flatten", [column]) if nested else column
        for part in (*lengths, values):
            for chunk in part.chunks:
                digest.update(chunk.to_numpy(zero_copy_only=False))
    return digest.hexdigest()


def _mask(kept: Iterable[bool]) -> pa.Array:
    return pa.array(list(kept), pa.bool_())


def _lengths(documents: pa.Table) -> list[int]:
    return pc.call_function("list_value_length", [documents["input_ids"]]).to_pylist()
