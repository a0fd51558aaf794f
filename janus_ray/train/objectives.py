"""What is minimised: pure functions of a model's outputs for a micro-batch.

Shape legend: S supervised positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from janus_ray.train.batches import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def summed_loss(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens of a micro-batch, in FP32.

    Logits are computed for those positions only.
    """
    logits_1SV = model(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        logits_to_keep=batch.positions_S,
        use_cache=False,
        document_ends_N=batch.document_ends_N,
        longest_document=batch.longest_document,
    ).logits
    return torch.nn.functional.cross_entropy(logits_1SV[0].float(), batch.targets_S, reduction="sum")
