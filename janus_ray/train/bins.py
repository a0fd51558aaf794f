"""Reading packed bins by index, and laying some of them out for a forward pass.

Shape legend: T tokens of a micro-batch, S supervised positions in it, N documents in it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from janus_ray.errors import ConfigError
from janus_ray.train.prepare import ROW_GROUP_BINS

if TYPE_CHECKING:
    import torch

# The plan jumps about: a cache helps only where the whole file fits, as in small runs.
_CACHED_ROW_GROUPS = 32


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Several bins laid end to end, without padding: attention is told where documents end."""

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


class PackedBins:
    """The bins of a run, read row group by row group when they are needed."""

    def __init__(self, path: Path | str) -> None:
        """Opens the file.

        Raises:
            ConfigError: this machine does not see it.
        """
        if not Path(path).is_file():
            raise ConfigError(
                f"{path}: no such file on {socket.gethostname()}; output_dir must be storage that every node sees"
            )
        self._file = pq.ParquetFile(path, memory_map=True)
        self._group = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._read_group)
        self._supervised = self._file.read(["num_supervised"])["num_supervised"].to_numpy()

    def __len__(self) -> int:
        """Number of bins."""
        return self._file.metadata.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One bin: its token ids, loss mask and document lengths."""
        return self._group(index // ROW_GROUP_BINS)[index % ROW_GROUP_BINS]

    def supervised_tokens(self) -> np.ndarray:
        """[bins] number of supervised tokens of each bin."""
        return self._supervised

    def document_lengths(self) -> list[np.ndarray]:
        """For each bin the lengths of its documents, in tokens."""
        return [np.array(lengths) for lengths in self._file.read(["document_lengths"])["document_lengths"].to_pylist()]

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        return self._file.read_row_group(group).to_pylist()


def micro_batch(bins: Sequence[dict[str, Any]], device: torch.device) -> MicroBatch:
    """Lays bins end to end.

    The token before a supervised one predicts it; a document's first token is never supervised (the mask audit saw to
    that), so no prediction crosses a document border.
    """
    import torch

    lengths = [length for packed in bins for length in packed["document_lengths"]]
    ids = np.concatenate([np.asarray(packed["input_ids"], dtype=np.int64) for packed in bins])
    supervised = np.flatnonzero(np.concatenate([np.asarray(packed["loss_mask"], dtype=bool) for packed in bins]))
    positions = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(
        input_ids_1T=torch.from_numpy(ids)[None].to(device),
        position_ids_1T=torch.from_numpy(positions)[None].to(device),
        document_ends_N=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        longest_document=max(lengths),
        positions_S=torch.from_numpy(supervised - 1).to(device),
        targets_S=torch.from_numpy(ids[supervised]).to(device),
    )
