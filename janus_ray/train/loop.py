"""The training loop that every worker runs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_ray.train.bins import MicroBatch, PackedBins, micro_batch
from janus_ray.train.model import build_sharded, export, load_checkpoint, save_checkpoint
from janus_ray.train.packing import Plan, make_plan, share_of
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.throughput import peak_flops, training_flops

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METRICS_FILE = "metrics.jsonl"


def train_worker(config: dict[str, Any]) -> None:
    """One worker of the run: builds its shard, resumes if there is a checkpoint, trains, exports.

    Args:
        config: "recipe" (resolved), "folder" (the output folder) and "template_sha256".
    """
    import ray.train
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device
    from ray.train.v2.api.report_config import CheckpointUploadMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    recipe, folder = TrainRecipe.model_validate(config["recipe"]), Path(config["folder"])
    torch.manual_seed(recipe.seed)
    if not recipe.use_gpu:
        torch.set_num_threads(recipe.threads_per_worker)
    device = get_device()
    assert isinstance(device, torch.device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bins = PackedBins(folder / "packed" / "bins.parquet")
    plan = make_plan(len(bins), recipe.bins_per_step, recipe.epochs, recipe.max_steps, recipe.seed)
    model = build_sharded(recipe, init_device_mesh(device.type, (world_size,)), device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        # On a GPU the fused kernel, which needs no second copy of the parameters while it steps.
        fused=recipe.use_gpu,
        foreach=not recipe.use_gpu,
    )
    progress: dict[str, Any] = {"step": 0, "plan_sha256": plan.sha256, "template_sha256": config["template_sha256"]}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            progress = load_checkpoint(model, optimizer, saved, progress)
    log = StepLog(folder, recipe, plan, bins, model) if rank == 0 else None
    if log is not None:
        log.restart_after(progress["step"])

    model.train()
    supervised_per_bin = bins.supervised_tokens()
    for step in range(progress["step"], len(plan.steps)):
        rate = learning_rate_at(step, len(plan.steps), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        supervised = int(supervised_per_bin[list(plan.steps[step])].sum())
        loss_sum = torch.zeros((), device=device)
        for members in share_of(plan.steps[step], rank, world_size, recipe.bins_per_micro_batch):
            loss_sum += backward(model, bins, members, plan.steps[step][0], supervised, world_size, device)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        is_last = step + 1 == len(plan.steps)
        if (step + 1) % recipe.log_every_steps == 0 or step == 0 or is_last:
            dist.all_reduce(loss_sum)
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
            if log is not None:
                log.write(step + 1, loss=float(loss_sum) / supervised, learning_rate=rate, grad_norm=norm)
        if (step + 1) % recipe.checkpoint_every_steps == 0 or is_last:
            # A thread uploads it while training goes on; Ray Train takes note of it within about two seconds.
            ray.train.report(
                {"step": step + 1},
                checkpoint=save_checkpoint(model, optimizer, {**progress, "step": step + 1}),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=True,
            )
    export(model, recipe, folder / "model")
    dist.barrier()


def learning_rate_at(step: int, num_steps: int, recipe: TrainRecipe) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then a cosine that ends at zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def backward(
    model: PreTrainedModel,
    bins: PackedBins,
    members: Sequence[int],
    stand_in: int,
    supervised: int,
    world_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Forward and backward of one micro-batch; returns its summed loss, without gradient.

    The gradient is that of loss_sum / (supervised tokens of the whole global batch). FSDP averages gradients over the
    workers, so the loss is scaled by their number. A worker without bins runs the stand-in with weight zero, because
    all workers meet in every layer.
    """
    batch = micro_batch([bins[index] for index in members or [stand_in]], device)
    loss = summed_loss(model, batch)
    (loss * (world_size / supervised if members else 0.0)).backward()
    return loss.detach() if members else loss.detach() * 0


def summed_loss(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens of a micro-batch, in FP32.

    Logits are computed for those positions only.
    """
    import torch

    logits_1SV = model(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        logits_to_keep=batch.positions_S,
        use_cache=False,
        document_ends_N=batch.document_ends_N,
        longest_document=batch.longest_document,
    ).logits
    return torch.nn.functional.cross_entropy(logits_1SV[0].float(), batch.targets_S, reduction="sum")


class StepLog:
    """Rank 0's metrics file: one JSON line per logged step, flushed, so that the driver can follow it."""

    def __init__(self, folder: Path, recipe: TrainRecipe, plan: Plan, bins: PackedBins, model: PreTrainedModel) -> None:
        """Counts what each step processes."""
        import torch

        self._path = folder / METRICS_FILE
        self._recipe, self._plan = recipe, plan
        self._lengths_per_bin = bins.document_lengths()
        self._tokens_per_bin = np.array([lengths.sum() for lengths in self._lengths_per_bin])
        self._supervised_per_bin = bins.supervised_tokens()
        self._shape = (
            sum(parameter.numel() for parameter in model.parameters()),
            sum(parameter.numel() for parameter in model.get_input_embeddings().parameters()),
            model.config.num_hidden_layers,
            model.config.hidden_size,
        )
        name = torch.cuda.get_device_name() if recipe.use_gpu else ""
        self._peak_flops = peak_flops(name)
        self._last_step, self._last_time = 0, time.monotonic()

    def restart_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed run does again."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._last_step, self._last_time = step, time.monotonic()

    def write(self, step: int, **values: float) -> None:
        """Appends the metrics of a step; rates are means since the line before."""
        now = time.monotonic()
        seconds = now - self._last_time
        recent = [index for members in self._plan.steps[self._last_step : step] for index in members]
        tokens = int(self._tokens_per_bin[recent].sum())
        current = list(self._plan.steps[step - 1])
        capacity = len(current) * self._recipe.max_length
        record = {
            "step": step,
            "num_steps": len(self._plan.steps),
            **values,
            "tokens_per_s": tokens / seconds,
            "mfu": self._mfu(recent, seconds),
            "padding_share": 1 - int(self._tokens_per_bin[current].sum()) / capacity,
            "supervised_tokens": int(self._supervised_per_bin[current].sum()),
            "worker_pid": os.getpid(),
        }
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self._last_step, self._last_time = step, now

    def _mfu(self, recent: Sequence[int], seconds: float) -> float | None:
        if self._peak_flops is None:
            return None
        lengths = np.concatenate([self._lengths_per_bin[index] for index in recent])
        return training_flops(lengths.tolist(), *self._shape) / seconds / (self._peak_flops * self._recipe.num_workers)
