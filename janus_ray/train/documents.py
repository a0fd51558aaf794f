"""Rows become documents: rendered, tokenised, masked, audited, and written as shards; one call for each batch of rows.

What comes back from a call are numbers. The token ids lie in the storage by then, and nobody hands them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from upath import UPath

from janus_ray.chat import ChatEncoder, ChatTemplate, EncodedExample, Message, loss_stretches, use_template
from janus_ray.errors import DataError
from janus_ray.model_folder import load_tokenizer
from janus_ray.store.hub import model_folder
from janus_ray.store.shards import Index, ShardEntry, id_type, write_shard
from janus_ray.text import one_line

_SHOWN_CHARACTERS = 60
_LONGEST_PART = 400


@dataclass(frozen=True, slots=True)
class Written:
    """What a batch of rows became."""

    entry: ShardEntry
    index: Index
    """Of the shard's documents; rows count from the batch's first."""
    rows: int
    refused: int
    """Rows that the template refuses."""
    first_refusal: str
    """Why, for the first of them."""
    example: str
    """One document in words, its parts with loss apart; empty where there is none."""


class DocumentWriter:
    """Turns batches of rows into shards, one shard a batch. A Ray actor, or an object of this process."""

    def __init__(self, base_model: str, chat_template: ChatTemplate, folder: Path | UPath) -> None:
        """Loads nothing yet, because what an actor's making raises is no error of ours any more.

        Args:
            base_model: a folder or the id of what is published, as this machine finds it.
            chat_template: the template.
            folder: the shards go there.
        """
        self._base_model, self._chat_template, self._folder = base_model, chat_template, folder

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return use_template(load_tokenizer(model_folder(self._base_model)), self._chat_template)

    @property
    def _dtype(self) -> np.dtype:
        return id_type(len(self._encoder.tokenizer))

    def write(self, number: int, batch: pa.Table) -> Written:
        """Writes the shard of a batch of rows with the column messages.

        Raises:
            DataError: a mask is wrong, or the shard cannot be written.
            CheckpointError: this machine does not find the base model's tokenizer.
        """
        refusals: list[str] = []
        parts: list[_Part] = []
        for row, messages in enumerate(batch["messages"].to_pylist()):
            encoded = encode_row(self._encoder, messages)
            if isinstance(encoded, str):
                refusals.append(encoded)
            else:
                # Arrays at once: the lists are ten times as large.
                parts += [
                    _Part(row, np.array(example.input_ids, self._dtype), np.array(example.loss_mask, np.bool_))
                    for example in encoded
                ]
        ids = np.concatenate([part.ids for part in parts]) if parts else np.zeros(0, self._dtype)
        mask = np.concatenate([part.mask for part in parts]) if parts else np.zeros(0, np.bool_)
        lengths = np.array([len(part.ids) for part in parts], dtype=np.int64)
        audit_documents(ids, mask, lengths, self._encoder)
        return Written(
            entry=write_shard(self._folder, number, ids, mask, len(parts)),
            index=Index(
                lengths=lengths,
                supervised=np.array([part.mask.sum() for part in parts], dtype=np.int64),
                rows=np.array([part.row for part in parts], dtype=np.int64),
            ),
            rows=len(batch),
            refused=len(refusals),
            first_refusal=refusals[0] if refusals else "",
            example=in_words(parts[0].ids, parts[0].mask, self._encoder) if parts else "",
        )


class _Part(NamedTuple):
    row: int
    ids: np.ndarray
    mask: np.ndarray


def encode_row(encoder: ChatEncoder, messages: list[Message]) -> list[EncodedExample] | str:
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


def audit_documents(ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, encoder: ChatEncoder) -> None:
    """Looks at every document as it is about to be written.

    A wrong mask trains the wrong thing without any error, so this is a gate and not a log line.

    Args:
        ids: [tokens] of all documents, end to end.
        mask: [tokens] whether a token carries loss.
        lengths: [documents] their tokens.
        encoder: of the template that they were made with.

    Raises:
        DataError: a document does not start as prompts do, does not end under loss, or has a stretch of loss in which
            the token that ends an answer does not stand at the end and only there.
    """
    if not len(lengths):
        return
    ends = np.cumsum(lengths)
    starts = ends - lengths
    followed = np.concatenate([mask[1:], [False]])
    followed[ends - 1] = False
    is_end = ids == encoder.end_id if encoder.end_id is not None else np.zeros(len(ids), np.bool_)
    # Under loss, the end of an answer stands where loss ends, and nowhere else.
    wrong = mask & (is_end == followed)
    wrong[starts] |= mask[starts]
    wrong[ends - 1] |= ~mask[ends - 1]
    if encoder.begin_id is not None:
        wrong[starts] |= ids[starts] != encoder.begin_id
    if wrong.any():
        document = int(np.searchsorted(ends, int(np.argmax(wrong)), side="right"))
        own = slice(int(starts[document]), int(ends[document]))
        stretches = loss_stretches(mask[own].tolist())
        first = stretches[0][0] if stretches else int(lengths[document])
        shown = encoder.tokenizer.decode(ids[own].tolist())
        raise DataError(f"mask audit: a document is wrong: {shown!r}, loss from token {first}")


def in_words(ids: np.ndarray, mask: np.ndarray, encoder: ChatEncoder) -> str:
    """A document decoded, its parts with loss apart, each with its middle left out where it is long."""

    def decode(part: np.ndarray) -> str:
        text = str(encoder.tokenizer.decode(part.tolist()))
        return text if len(text) <= _LONGEST_PART else f"{text[: _LONGEST_PART // 2]} ... {text[-_LONGEST_PART // 2 :]}"

    shown = []
    stretches = loss_stretches(mask.tolist())
    # What is behind the last stretch carries nothing, and the audit has seen that nothing is there.
    for (_, before), (begin, end) in pairwise([(0, 0), *stretches]):
        shown.append(f"{decode(ids[before:begin])!r} + loss on {decode(ids[begin:end])!r}")
    return " + ".join(shown)
