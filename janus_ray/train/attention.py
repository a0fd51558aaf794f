"""Causal attention that never crosses a document border, as an attention implementation of transformers.

Documents lie end to end in one row; their ends come in as a keyword argument of the model's forward. On a GPU this is
one variable-length kernel, on a CPU one exact causal attention per document: no [T, T] mask in either case.

Shape legend: B batch (always 1), H query heads, K key heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "janus_documents"


def register() -> None:
    """Makes the implementation known to transformers; calling it again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, document_attention)
    # The borders replace the mask.
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def document_attention(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    document_ends_N: torch.Tensor,
    longest_document: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within each document.

    Returns:
        [B, T, H, D], and None for the attention weights.
    """
    if query_BHTD.is_cuda:
        output_THD = _varlen_on_gpu(query_BHTD, key_BKTD, value_BKTD, scaling, document_ends_N, longest_document)
        return output_THD[None], None
    return _document_by_document(query_BHTD, key_BKTD, value_BKTD, scaling, document_ends_N), None


def _varlen_on_gpu(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    scaling: float | None,
    document_ends_N: torch.Tensor,
    longest_document: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output_THD = varlen_attn(
        query_BHTD[0].transpose(0, 1).contiguous(),
        key_BKTD[0].transpose(0, 1).contiguous(),
        value_BKTD[0].transpose(0, 1).contiguous(),
        document_ends_N,
        document_ends_N,
        longest_document,
        longest_document,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert not isinstance(output_THD, tuple)
    return output_THD


def _document_by_document(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    scaling: float | None,
    document_ends_N: torch.Tensor,
) -> torch.Tensor:
    import torch

    lengths = document_ends_N.diff().tolist()
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        for query, key, value in zip(
            query_BHTD.split(lengths, dim=2),
            key_BKTD.split(lengths, dim=2),
            value_BKTD.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
