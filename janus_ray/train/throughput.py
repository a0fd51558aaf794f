"""Tokens, FLOPs and the share of a device's peak that a step used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from janus_ray.train.families import attention_windows, head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense BF16 peak without sparsity, FLOP/s, from the vendors' data sheets; the first name that fits counts.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """The device's dense BF16 peak in FLOP/s; None where we do not know it (every CPU)."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model counts in FLOPs."""

    body_parameters: int
    """Parameters that every token passes: all but the embedding, which is looked up, and the head."""
    head_parameters: int
    """Parameters of the head; where it is tied to the embedding, that table."""
    attention_width: int
    """Query heads times their width; the hidden size only by chance."""
    windows: tuple[int | None, ...]
    """For each layer how many tokens one sees; None: all before it."""


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, sharded or not."""
    outside = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    tables = {id(parameter) for parameter in outside}
    return ModelShape(
        body_parameters=sum(each.numel() for each in model.parameters() if id(each) not in tables),
        head_parameters=sum(each.numel() for each in model.get_output_embeddings().parameters()),
        attention_width=model.config.num_attention_heads * head_dim(model.config),
        windows=tuple(attention_windows(model.config)),
    )


def training_flops(document_lengths: Sequence[int] | np.ndarray, num_supervised: int, shape: ModelShape) -> float:
    """FLOPs of forward and backward over some documents.

    6 per parameter and token (Kaplan et al. 2020), the head's only for the supervised tokens, whose logits alone are
    computed. 12 w per layer and pair of tokens that see each other, w being heads times their width, for scores and
    values (Chowdhery et al. 2022, appendix B): len^2 / 2 pairs of a document, less (len - window)^2 / 2 where a window
    is shorter. Recomputation does not count: this is model FLOPs.
    """
    lengths = np.asarray(document_lengths, dtype=np.float64)
    pairs = sum(
        float((lengths**2 - (0 if window is None else np.maximum(lengths - window, 0) ** 2)).sum()) / 2
        for window in shape.windows
    )
    matmuls = shape.body_parameters * float(lengths.sum()) + shape.head_parameters * num_supervised
    return 6.0 * matmuls + 12.0 * shape.attention_width * pairs
