"""The plan of a run: which documents make which optimizer step. Pure functions over lengths; no token is looked at.

A plan depends on lengths, a seed and the recipe only, never on the number of workers: step i trains on the same
documents with one worker, with two, and after a resume.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.files import read_bytes, write_bytes

DOCUMENTS_FOLDER = "documents"
PLAN_FILE = "plan.npz"
SINGLE = ("document",)
"""The roles of a plan whose groups are one document each."""


class Ragged:
    """Lists of numbers of different lengths, one behind the other in one array."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        """Takes [numbers] and [lists + 1] the place where each list begins, and where the last ends."""
        self.flat, self.offsets = flat, offsets

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """The same lists in an array."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(np.fromiter((number for each in lists for number in each), np.int64, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class Group:
    """Documents that are trained on together: one of a fine-tuning, the chosen and the rejected answer of a pair."""

    documents: tuple[int, ...]
    """Their indices, one for each role of the plan."""


@dataclass(frozen=True)
class Plan:
    """Steps of bins of groups of documents, as numbers: step -> bins -> groups -> documents."""

    roles: tuple[str, ...]
    """What the columns of `groups` are, say ("chosen", "rejected")."""
    groups: np.ndarray
    """[groups, roles] index of a document."""
    bins: Ragged
    """For each bin the groups in it, which lie end to end in a micro-batch."""
    bins_by_step: Ragged
    """For each step its bins; an epoch later they come again."""

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.bins_by_step)

    @property
    def steps(self) -> Iterator[tuple[Group, ...]]:
        """The groups of each step, in order."""
        return (tuple(group for number in step for group in self.groups_of(number)) for step in self.bins_by_step)

    def groups_of(self, bin_: int) -> list[Group]:
        """The groups in a bin."""
        return [Group(tuple(documents)) for documents in self.groups[self.bins[bin_]].tolist()]

    def documents_of(self, bin_: int) -> np.ndarray:
        """The documents in a bin, group by group."""
        return self.groups[self.bins[bin_]].reshape(-1)

    def per_bin(self, values: np.ndarray) -> np.ndarray:
        """[bins] sum of a [documents] value over each bin's documents."""
        by_group = values[self.groups].sum(axis=1, dtype=np.int64)
        # No bin is empty, which reduceat would get wrong.
        return np.add.reduceat(by_group[self.bins.flat], self.bins.offsets[:-1])

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole plan; a checkpoint belongs to one plan."""
        digest = hashlib.sha256(" ".join(self.roles).encode())
        for array in (self.groups, *_arrays(self.bins), *_arrays(self.bins_by_step)):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def make_plan(
    lengths: np.ndarray,
    groups: np.ndarray,
    max_length: int,
    bins_per_step: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
    roles: tuple[str, ...] = SINGLE,
) -> Plan:
    """Packs the groups into bins, shuffles these anew for each epoch and cuts the stream of epochs into steps.

    Only the very last step may hold fewer than bins_per_step bins, so that no data is dropped.

    Args:
        lengths: [documents] tokens.
        groups: [groups, roles] indices of documents; no group is longer than max_length.
        max_length: tokens of a bin.
        bins_per_step: bins in the global batch.
        epochs: how often each bin comes.
        max_steps: the plan ends there; None: with the last epoch.
        seed: of the order.
        roles: what the columns of `groups` are.
    """
    assert groups.ndim == 2 and groups.shape[1] == len(roles)
    bins = pack(lengths[groups].sum(axis=1).tolist(), max_length)
    stream: list[int] = []
    for epoch in range(epochs):
        order = list(range(len(bins)))
        random.Random(f"{seed}|{epoch}").shuffle(order)
        stream += order
    steps = [stream[start : start + bins_per_step] for start in range(0, len(stream), bins_per_step)]
    return Plan(roles, np.asarray(groups, dtype=np.int64), Ragged.of(bins), Ragged.of(steps[:max_steps]))


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Packs pieces into bins: longest first, each into the fullest bin that still has room (best-fit decreasing).

    Args:
        lengths: tokens of each piece, none above max_length.
        max_length: tokens of a bin.

    Returns:
        The pieces' indices by bin; every piece is in exactly one.
    """
    bins: list[list[int]] = []
    # Bins by free room, and a bit for each room that some bin has: the lowest one from a length on is the best fit.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= max_length, f"piece {index} has {length} tokens, a bin {max_length}"
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            number = heapq.heappop(by_room[room])
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            bins.append([])
            number, room = len(bins) - 1, max_length
        bins[number].append(index)
        heapq.heappush(by_room.setdefault(room - length, []), number)
        rooms |= 1 << (room - length)
    return bins


def share_of(
    step: Sequence[int] | np.ndarray, rank: int, world_size: int, bins_per_micro_batch: int
) -> list[list[int]]:
    """One worker's part of a step: its micro-batches of bins.

    Every worker gets the same number of micro-batches, because the workers meet in every forward and backward; where
    the bins do not divide evenly some are empty.
    """
    own = [int(number) for number in step[rank::world_size]]
    longest = -(-len(step) // world_size)
    return [own[start : start + bins_per_micro_batch] for start in range(0, longest, bins_per_micro_batch)]


def write_plan(plan: Plan, path: Path | UPath) -> None:
    """Writes a plan, whole or not at all."""
    arrays: dict[str, Any] = dict(
        zip(_NAMES, (plan.groups, *_arrays(plan.bins), *_arrays(plan.bins_by_step)), strict=True)
    )
    archive = BytesIO()
    np.savez(archive, roles=np.array(plan.roles), sha256=np.array(plan.sha256), **arrays)
    write_bytes(path, archive.getvalue())


def read_plan(path: Path | UPath) -> Plan:
    """Reads a plan.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with np.load(BytesIO(read_bytes(path))) as found:
            groups, *ragged = (found[name] for name in _NAMES)
            plan = Plan(tuple(found["roles"].tolist()), groups, Ragged(*ragged[:2]), Ragged(*ragged[2:]))
            whole = plan.sha256 == str(found["sha256"])
    except (OSError, KeyError, ValueError, TypeError, EOFError, NotImplementedError, BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error or type(error).__name__}") from None
    if not whole:
        raise DataError(f"{path}: is damaged (its content has another hash)")
    return plan


_NAMES = ("groups", "bins", "bin_offsets", "steps", "step_offsets")


def _arrays(ragged: Ragged) -> tuple[np.ndarray, np.ndarray]:
    return ragged.flat, ragged.offsets
