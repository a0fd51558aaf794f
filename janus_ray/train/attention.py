"""Causal attention that never crosses a document border, as an attention implementation of transformers.

Documents lie end to end in one row; their ends come in as a keyword argument of the model's forward. On a GPU this is
one variable-length kernel, on a CPU one exact causal attention per document: no [T, T] mask in either case. A layer's
sliding window is exact in both; its soft cap on a CPU only, since the GPU's kernel has none (`families` refuses that
before anything starts). Whatever else a layer asks of its attention is refused here, never dropped.

Shape legend: B batch (always 1), H query heads, K key heads, T tokens, L tokens of one document, D head width.
"""

from __future__ import annotations

from typing import Any

import torch

from janus_ray.errors import CheckpointError

IMPLEMENTATION = "janus_documents"

# What transformers hands to every attention function and what changes nothing here: positions are in the queries and
# keys already, dropout is off (`model.training_config`), and there is no cache. A mask or bias is never among them.
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "dropout", "output_attentions", "output_hidden_states"})


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_ends_N: torch.Tensor,
    longest_document: int,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within each document.

    Args:
        module: the layer that asks.
        query_BHTD: queries.
        key_BKTD: keys.
        value_BKTD: values.
        attention_mask: always None.
        scaling: factor of the scores; None: 1 / sqrt(D).
        sliding_window: how many tokens one sees, itself included; None: all before it.
        softcap: scores are squeezed into ± this by a tanh; None: not at all.
        document_ends_N: cumulative lengths of the documents, starting with 0.
        longest_document: the longest of them.
        **asked: whatever else the layer asks for.

    Returns:
        [B, T, H, D], and None for the attention weights.

    Raises:
        CheckpointError: the layer asks for something that this attention does not do.
    """
    _refuse_the_unknown(module, attention_mask, asked)
    if sliding_window is not None and sliding_window >= longest_document:
        sliding_window = None
    if query_BHTD.is_cuda:
        assert softcap is None, "refused before the start"
        output_THD = _varlen_on_gpu(
            query_BHTD, key_BKTD, value_BKTD, scaling, sliding_window, document_ends_N, longest_document
        )
        return output_THD[None], None
    lengths = document_ends_N.diff().tolist()
    outputs = [
        _one_document(query, key, value, scaling, sliding_window, softcap)
        for query, key, value in zip(
            query_BHTD.split(lengths, dim=2),
            key_BKTD.split(lengths, dim=2),
            value_BKTD.split(lengths, dim=2),
            strict=True,
        )
    ]
    return _concatenated(outputs), None


def _refuse_the_unknown(module: Any, attention_mask: Any, asked: dict[str, Any]) -> None:
    wanted = {name for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT}
    wanted -= {"is_causal"} if asked.get("is_causal") else set()
    if not getattr(module, "is_causal", True):
        wanted.add("is_causal=False")
    if attention_mask is not None:
        wanted.add("attention_mask")
    if asked.get("dropout"):
        wanted.add("dropout")
    if wanted:
        raise CheckpointError(f"{type(module).__name__}: packed attention does not do {', '.join(sorted(wanted))}")


def _varlen_on_gpu(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
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
        # Tokens to the left and right beside the token itself; -1: all.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert not isinstance(output_THD, tuple)
    return output_THD


def _one_document(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, H, L, D] for one document on a CPU."""
    length = query_BHLD.shape[2]
    if softcap is None and (sliding_window is None or sliding_window >= length):
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHLD, key_BKLD, value_BKLD, is_causal=True, scale=scaling, enable_gqa=True
        )
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=query_BHLD.device).tril()
    if sliding_window is not None:
        seen_LL = seen_LL.triu(1 - sliding_window)
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHLD, key_BKLD, value_BKLD, attn_mask=seen_LL, scale=scaling, enable_gqa=True
        )
    groups = query_BHLD.shape[1] // key_BKLD.shape[1]
    scores_BHLL = query_BHLD @ key_BKLD.repeat_interleave(groups, dim=1).transpose(2, 3)
    scores_BHLL = scores_BHLL * (query_BHLD.shape[3] ** -0.5 if scaling is None else scaling)
    capped_BHLL = (softcap * torch.tanh(scores_BHLL / softcap)).masked_fill(~seen_LL, float("-inf"))
    weights_BHLL = capped_BHLL.softmax(dim=-1, dtype=torch.float32).to(query_BHLD.dtype)
    return weights_BHLL @ value_BKLD.repeat_interleave(groups, dim=1)


def _concatenated(outputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
