"""The step of the miniature's model on 1, 2 and 4 CPU workers, and what of it is lost to gloo.

Each rank trains twice, in turns: in one group with the others, as a run does, and alone on the same part of the batch,
at the same time as the others but without a word to them. What the first takes longer is gloo's, and a little more:
alone, a rank updates all weights instead of its share of them.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from janus_ray.train.context import LocalContext, LocalWorkers

UNIT = "workers"
SIZES = (1, 2, 4)
TARGET = 4
_STEPS = 24
_WARM_UP = 3
# As in miniature_sft.toml, with documents of the lengths that its rows have.
_MAX_LENGTH, _BINS_PER_STEP, _LENGTH = 512, 4, 100


def make(size: int, folder: Path) -> None:
    """Writes an untrained model of the miniature's shape."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from janus_ray.miniature.kit import train_tokenizer
    from janus_ray.miniature.recipe import BaseModelRecipe

    shape = BaseModelRecipe(collection="c", output_dir="o")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_position_embeddings,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    MistralForCausalLM(config).save_pretrained(folder / "base")
    train_tokenizer(iter(["some words"]), 300).save_pretrained(folder / "base")


def measure(size: int, folder: Path) -> dict[str, Any]:
    """Times the steps of so many workers."""
    together, alone = LocalWorkers().run(size, steps, str(folder / "base"))[0]
    lost = sorted(100 * (1 - apart.wall_s / joined.wall_s) for joined, apart in zip(together, alone, strict=True))
    quarter = len(lost) // 4
    return {
        "step_ms": 1000 * statistics.median(step.wall_s for step in together),
        "alone_ms": 1000 * statistics.median(step.wall_s for step in alone),
        "gloo_percent": statistics.median(lost),
        "gloo_percent_from": lost[quarter],
        "gloo_percent_to": lost[-quarter - 1],
        # Says something on a machine that does other work meanwhile.
        "step_cpu_ms": 1000 * statistics.median(step.cpu_s for step in together),
        "alone_cpu_ms": 1000 * statistics.median(step.cpu_s for step in alone),
    }


class Step(NamedTuple):
    """What a step took on one rank."""

    wall_s: float
    cpu_s: float


def steps(context: LocalContext, base: str) -> tuple[list[Step], list[Step]]:
    """Each step of this rank, in the group and alone."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from janus_ray.train.batches import micro_batch
    from janus_ray.train.loop import backward
    from janus_ray.train.model import build_sharded
    from janus_ray.train.plan import share_of
    from janus_ray.train.recipe import TrainRecipe

    recipe = TrainRecipe(
        collection="c",
        base_model=base,
        output_dir="o",
        max_length=_MAX_LENGTH,
        precision="fp32",
        activation_checkpointing=False,
        reshard_after_forward=False,
    )
    world_size, source = dist.get_world_size(), np.random.default_rng(0)
    mask = np.arange(_LENGTH) >= _LENGTH // 2
    documents = [[(source.integers(5, 200, _LENGTH), mask)] * (_MAX_LENGTH // _LENGTH) for _ in range(_BINS_PER_STEP)]
    shares = share_of(range(_BINS_PER_STEP), dist.get_rank(), world_size, _BINS_PER_STEP)
    batches = [micro_batch([each for bin_ in share for each in documents[bin_]], context.device) for share in shares]
    supervised = int(mask.sum()) * _BINS_PER_STEP * (_MAX_LENGTH // _LENGTH)
    meshes = (
        init_device_mesh("cpu", (world_size,)),
        init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("apart", "shard"))["shard"],
    )
    models = [build_sharded(recipe, mesh, context.device).train() for mesh in meshes]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True) for model in models]

    def step(which: int) -> Step:
        dist.barrier()
        began, cpu_began = time.monotonic(), time.process_time()
        for batch in batches:
            backward(models[which], batch, supervised, world_size)
        torch.nn.utils.clip_grad_norm_(models[which].parameters(), 1.0)
        optimizers[which].step()
        optimizers[which].zero_grad()
        return Step(time.monotonic() - began, time.process_time() - cpu_began)

    times = [(step(0), step(1)) for _ in range(_WARM_UP + _STEPS)]
    return [joined for joined, _ in times[_WARM_UP:]], [apart for _, apart in times[_WARM_UP:]]
