"""Packing and the pack plan: pure functions that decide which tokens make which optimizer step.

Both depend on lengths, a seed and the recipe only, never on the number of workers: step i trains on the same set of
bins with one worker, with two, and after a resume.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from janus_ray.records import canonical_json


@dataclass(frozen=True, slots=True)
class Plan:
    """Which bins make each optimizer step, in order."""

    steps: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Hash of the whole plan; a checkpoint belongs to one plan."""
        return hashlib.sha256(canonical_json(self.steps).encode()).hexdigest()


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Packs documents into bins: longest first, each into the fullest bin that still has room (best-fit decreasing).

    Args:
        lengths: tokens of each document, none above max_length.
        max_length: tokens of a bin.

    Returns:
        The documents' indices by bin; every document is in exactly one.
    """
    bins: list[list[int]] = []
    # Bins by free room; each bin stands in exactly one of the lists.
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= max_length, f"document {index} has {length} tokens, a bin {max_length}"
        room = min((room for room in by_room if room >= length), default=None)
        if room is None:
            bins.append([])
            number, room = len(bins) - 1, max_length
        else:
            number = heapq.heappop(by_room[room])
            if not by_room[room]:
                del by_room[room]
        bins[number].append(index)
        heapq.heappush(by_room.setdefault(room - length, []), number)
    return bins


def make_plan(num_bins: int, bins_per_step: int, epochs: int, max_steps: int | None, seed: int) -> Plan:
    """Shuffles the bins anew for each epoch and cuts the stream of epochs into steps.

    Only the very last step may hold fewer than bins_per_step bins, so that no data is dropped.
    """
    stream: list[int] = []
    for epoch in range(epochs):
        order = list(range(num_bins))
        random.Random(f"{seed}|{epoch}").shuffle(order)
        stream += order
    steps = [tuple(stream[start : start + bins_per_step]) for start in range(0, len(stream), bins_per_step)]
    return Plan(tuple(steps[:max_steps]))


def share_of(step: Sequence[int], rank: int, world_size: int, bins_per_micro_batch: int) -> list[list[int]]:
    """One worker's part of a step: its micro-batches of bins.

    Every worker gets the same number of micro-batches, because the workers meet in every forward and backward; where
    the bins do not divide evenly some are empty.
    """
    own = list(step[rank::world_size])
    longest = -(-len(step) // world_size)
    return [own[start : start + bins_per_micro_batch] for start in range(0, longest, bins_per_micro_batch)]
