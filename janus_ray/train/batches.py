"""The documents of a run as its workers read them, laid end to end for a forward pass.

Shape legend: T tokens of a micro-batch, S supervised positions in it, N documents in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from upath import UPath

from janus_ray.store.location import location
from janus_ray.store.shards import TokenShards
from janus_ray.train.plan import DOCUMENTS_FOLDER, PLAN_FILE, read_plan


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Several documents laid end to end, without padding: attention is told where they end."""

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    """Position inside its own document."""
    document_ends_N: torch.Tensor
    """Cumulative lengths, starting with 0: N + 1 numbers."""
    longest_document: int
    positions_S: torch.Tensor
    """Positions whose next token is supervised."""
    targets_S: torch.Tensor
    """Those next tokens."""


def micro_batch(documents: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> MicroBatch:
    """Lays documents end to end.

    The token before a supervised one predicts it; a document's first token is never supervised (the mask audit saw to
    that), so no prediction crosses a document border.

    Args:
        documents: of each its token ids, and for each token whether it carries loss.
        device: of the tensors.
    """
    lengths = [len(ids) for ids, _ in documents]
    ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    supervised = np.flatnonzero(np.concatenate([mask for _, mask in documents]))
    positions = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(
        input_ids_1T=torch.from_numpy(ids)[None].to(device),
        position_ids_1T=torch.from_numpy(positions)[None].to(device),
        document_ends_N=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        longest_document=max(lengths),
        positions_S=torch.from_numpy(supervised - 1).to(device),
        targets_S=torch.from_numpy(ids[supervised]).to(device),
    )


class TrainingData:
    """The documents of a run and its plan, as a worker reads them."""

    def __init__(self, folder: Path | UPath) -> None:
        """Opens both; no document is read yet.

        Raises:
            ConfigError: this machine does not see the folder.
            DataError: something in it is damaged.
        """
        folder = location(folder)
        self._documents = TokenShards(folder / DOCUMENTS_FOLDER)
        self.plan = read_plan(folder / PLAN_FILE)
        index = self._documents.index
        self.tokens_per_bin, self.supervised_per_bin = map(self.plan.per_bin, (index.lengths, index.supervised))

    def micro_batch(self, bins: Sequence[int] | np.ndarray, device: torch.device) -> MicroBatch:
        """The documents of some bins, laid end to end."""
        return micro_batch([self._documents[int(i)] for bin_ in bins for i in self.plan.documents_of(bin_)], device)

    def lengths_in(self, bins: Sequence[int] | np.ndarray) -> np.ndarray:
        """The lengths of the documents in some bins."""
        return self._documents.index.lengths[np.concatenate([self.plan.documents_of(bin_) for bin_ in bins])]
