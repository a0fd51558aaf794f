"""Tokens, FLOPs and the share of a device's peak that a step used."""

from __future__ import annotations

from collections.abc import Sequence

# Dense BF16 peak without sparsity, FLOP/s, from the vendors' data sheets.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """The device's dense BF16 peak in FLOP/s; None where we do not know it (every CPU)."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def training_flops(
    document_lengths: Sequence[int], num_parameters: int, num_embedding: int, num_layers: int, hidden_size: int
) -> float:
    """FLOPs of forward and backward over some documents.

    6 per parameter and token, without the embedding table, which is looked up (Kaplan et al. 2020); and
    6 L d len^2 per document for causal attention scores and values, half of the full square (Chowdhery et al. 2022,
    appendix B). Recomputation does not count: this is model FLOPs.
    """
    tokens = sum(document_lengths)
    squares = sum(length**2 for length in document_lengths)
    return 6.0 * (num_parameters - num_embedding) * tokens + 6.0 * num_layers * hidden_size * squares
