"""The offline part: render, tokenise and mask with Ray Data, then pack into Parquet that workers read by index."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from janus_ray.chat import ChatEncoder, ChatTemplate, EncodedExample, conversation, use_template
from janus_ray.cluster import quiet_ray_data
from janus_ray.errors import DataError
from janus_ray.model_folder import load_tokenizer, save_tokenizer
from janus_ray.store.files import read_json, write_json
from janus_ray.store.tables import write_parquet
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

_ENCODED = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8()))])
_ROWS_PER_BLOCK = 1024
_SHOWN_CHARACTERS = 60


def prepare(recipe: TrainRecipe, collection: Collection, folder: Path) -> dict[str, Any]:
    """Writes `packed/bins.parquet` below the folder and returns what was done, in numbers.

    Raises:
        DataError: no row fits into a bin, or the audit finds a wrong mask.
        CheckpointError: the base model has no usable tokenizer.
    """
    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    documents = _encode(collection.rows, recipe)
    fitting = documents.filter(_mask(length <= recipe.max_length for length in _lengths(documents)))
    if not len(fitting):
        raise DataError(f"{recipe.collection}: none of {len(documents)} rows fits into {recipe.max_length} tokens")
    packed = _packed_table(fitting, recipe.max_length)
    audit_masks(packed, encoder)
    write_parquet(folder / PACKED_FOLDER / BINS_FILE, packed, ROW_GROUP_BINS)
    supervised, tokens = sum(packed["num_supervised"].to_pylist()), sum(_lengths(packed))
    counts = {
        **collection.counts,
        "rows_too_long": len(documents) - len(fitting),
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
    """Encodes a row with and one without a system message, and writes and reads the tokenizer as an export will.

    Args:
        recipe: names the base model and the template.
        rows: what is to be trained on; None where it is packed already.

    Returns:
        The template's hash with this tokenizer.

    Raises:
        CheckpointError: the tokenizer cannot be used with this template, or an export of it could not be served.
        DataError: the template does not take such rows.
    """
    from transformers import AutoConfig

    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    systems = rows["system"].to_pylist() if rows is not None else []
    for kind in (True, False):
        index = next((index for index, system in enumerate(systems) if bool(system) == kind), None)
        if rows is not None and index is not None:
            _encoded(encoder, rows.slice(index, 1).to_pylist()[0])
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.from_pretrained(recipe.base_model).save_pretrained(folder)
        save_tokenizer(encoder.tokenizer, Path(folder))
    return encoder.probe_sha256()


def audit_masks(packed: pa.Table, encoder: ChatEncoder) -> str:
    """Looks at every document before the first step, and prints what carries loss in one of them.

    A wrong mask trains the wrong thing without any error, so this is a gate and not a log line.

    Returns:
        The printed example, its part with loss in brackets.

    Raises:
        DataError: a document does not start as prompts do, does not end with the token that ends an answer under
            loss, or has loss that is not one block at its end.
    """
    shown, decode = "", encoder.tokenizer.decode
    for row in packed.to_pylist():
        start = 0
        for length in row["document_lengths"]:
            ids, mask = row["input_ids"][start : start + length], row["loss_mask"][start : start + length]
            start += length
            first = mask.index(1) if 1 in mask else length
            sound = encoder.begin_id in (None, ids[0]) and ids[-1] == encoder.end_id
            if not sound or not 0 < first < length or not all(mask[first:]):
                raise DataError(f"mask audit: a document is wrong: {decode(ids)!r}, loss from token {first}")
            shown = shown or f"{decode(ids[:first])!r} + loss on {decode(ids[first:])!r}"
    print(f"train: mask audit: {shown}", flush=True)
    return shown


def _encode(rows: pa.Table, recipe: TrainRecipe) -> pa.Table:
    """Token ids and loss masks of all rows, in the rows' order."""
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
        examples = [_encoded(self._encoder, row) for row in batch.to_pylist()]
        masks = [[int(loss) for loss in example.loss_mask] for example in examples]
        return pa.table({"input_ids": [example.input_ids for example in examples], "loss_mask": masks}, schema=_ENCODED)


def _encoded(encoder: ChatEncoder, row: dict[str, Any]) -> EncodedExample:
    """A row as a training example, compared with the row.

    Raises:
        DataError: the template does not take it, or its mask is wrong; with the beginning of its prompt.
    """
    try:
        example = encoder.encode_example(conversation(row["system"], row["prompt"]), row["output"])
        encoder.audit(example, row["output"])
    except DataError as error:
        raise DataError(f"row with the prompt {row['prompt'][:_SHOWN_CHARACTERS]!r}: {error}") from None
    return example


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
