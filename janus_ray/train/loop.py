"""The training loop that every worker runs. It needs a process group and a shared folder, and knows nothing of Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from upath import UPath

from janus_ray.errors import TrainingError
from janus_ray.store.location import location
from janus_ray.train.batches import MicroBatch, TrainingData
from janus_ray.train.checkpoint import Checkpoints, load_checkpoint, named_when_not_written
from janus_ray.train.context import Context
from janus_ray.train.model import build_sharded, export
from janus_ray.train.objectives import summed_loss
from janus_ray.train.plan import share_of
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.step_log import StepLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = "model"
# Nats per token. Guessing among a million tokens costs 14; only weights that are broken, yet finite, cost this.
_LARGEST_LOSS = 1000.0


def train_loop(
    context: Context,
    recipe: TrainRecipe,
    folder: Path | UPath,
    identity: Mapping[str, str],
    checkpoint: Path | UPath | None,
) -> dict[str, Any]:
    """One worker of the run: builds its shard, goes on from the checkpoint, trains, exports. All ranks call it.

    The same on every worker, it returns the last step and its loss.

    Args:
        context: where it runs.
        recipe: what to do; its base model is a local folder.
        folder: the run's folder, which all workers see; it holds the documents and the plan.
        identity: hashes of what the run is made from; a checkpoint with others is refused.
        checkpoint: where to go on from; None starts at the first step.

    Raises:
        TrainingError: a loss, a gradient or a weight is not finite, or a loss is beyond any model's.
        CheckpointError: the checkpoint belongs to another run, or something cannot be written.
    """
    torch.manual_seed(recipe.seed)
    folder, device = location(folder), context.device
    data = TrainingData(folder)
    model = build_sharded(recipe, init_device_mesh(device.type, (dist.get_world_size(),)), device)
    optimizer = _optimizer(model, recipe)
    progress: dict[str, Any] = {"step": 0, "plan_sha256": data.plan.sha256, **identity}
    if checkpoint is not None:
        progress = load_checkpoint(model, optimizer, checkpoint, progress)
    _stop_unless_weights_are_finite(model, progress["step"], progress["step"])
    log = StepLog(folder, recipe, data, model, context, progress["step"]) if dist.get_rank() == 0 else None
    model.train()
    with Checkpoints(folder, recipe.keep_checkpoints) as checkpoints:
        progress = _train(model, optimizer, data, recipe, device, progress, checkpoints, log)
    with named_when_not_written(folder / MODEL_FOLDER):
        export(model, recipe, folder / MODEL_FOLDER)
    if log is not None:
        log.close()
    dist.barrier()
    return {"step": progress["step"], "loss": progress["loss"]}


def _train(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    data: TrainingData,
    recipe: TrainRecipe,
    device: torch.device,
    progress: dict[str, Any],
    checkpoints: Checkpoints,
    log: StepLog | None,
) -> dict[str, Any]:
    """The steps from where the run is to its end; returns the progress by then."""
    steps = data.plan.bins_by_step
    saved = progress["step"]
    for step in range(saved + 1, len(steps) + 1):
        bins, is_last = steps[step - 1], step == len(steps)
        loss, grad_norm = _gradient(model, data, bins, recipe, device)
        _stop_unless_sound(f"step {step}", saved, loss, grad_norm)
        rate = learning_rate_at(step - 1, len(steps), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if log is not None and (step % recipe.log_every_steps == 0 or step == 1 or is_last):
            log.checkpoint_s = checkpoints.write_s
            log.write(step, loss=loss, learning_rate=rate, grad_norm=grad_norm)
        if step % recipe.checkpoint_every_steps == 0 or is_last:
            _stop_unless_weights_are_finite(model, step, saved)
            _stop_unless_the_model_answers(model, data, bins, step, saved, device)
            progress = {**progress, "step": step, "loss": loss}
            if log is not None:
                log.flush()
            checkpoints.save(model, optimizer, progress)
            saved = step
    return progress


def _optimizer(model: PreTrainedModel, recipe: TrainRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        # On a GPU the fused kernel, which needs no second copy of the parameters while it steps.
        fused=recipe.use_gpu,
        foreach=not recipe.use_gpu,
    )


def _gradient(
    model: PreTrainedModel, data: TrainingData, bins: np.ndarray, recipe: TrainRecipe, device: torch.device
) -> tuple[float, float]:
    """Fills the gradient of a step, clipped.

    Returns:
        The loss per supervised token, and the gradient's L2 norm before it was clipped; both over all workers.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    supervised = int(data.supervised_per_bin[bins].sum())
    loss_sum = torch.zeros((), device=device)
    for share in share_of(bins, rank, world_size, recipe.bins_per_micro_batch):
        batch = data.micro_batch(share or bins[:1], device)
        loss_sum += backward(model, batch, supervised, world_size, counts=bool(share))
    dist.all_reduce(loss_sum)
    return float(loss_sum) / supervised, _clipped_norm(model, recipe.max_grad_norm)


def _clipped_norm(model: PreTrainedModel, max_norm: float) -> float:
    """Clips the gradient over all workers and returns its L2 norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _stop_unless_sound(when: str, saved: int, loss: float, grad_norm: float = 0.0) -> None:
    """Before an optimizer step or a checkpoint; the values are the same on every worker, so all of them stop.

    Args:
        when: the step, for the message.
        saved: the step of the newest checkpoint.
        loss: in nats per token.
        grad_norm: the gradient's L2 norm.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise TrainingError(f"{when}: the {name} is not finite ({value}); {_what_stays(saved)}")
    if loss > _LARGEST_LOSS:
        raise TrainingError(f"{when}: a loss of {loss:.3g} nats per token is no model any more; {_what_stays(saved)}")


def _stop_unless_weights_are_finite(model: PreTrainedModel, step: int, saved: int) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    local = [each.to_local() if isinstance(each, DTensor) else each for each in parameters]
    finite = torch.stack([each.detach().isfinite().all() for each in local]).to(torch.int32)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    bad = [name for name, sound in zip(names, finite.tolist(), strict=True) if not sound]
    if bad:
        if not step:
            raise TrainingError(
                f"base model: {bad[0]} holds values that are not finite; stopped before step 1, nothing is exported"
            )
        raise TrainingError(f"after step {step}: {bad[0]} holds values that are not finite; {_what_stays(saved)}")


def _stop_unless_the_model_answers(
    model: PreTrainedModel, data: TrainingData, bins: np.ndarray, step: int, saved: int, device: torch.device
) -> None:
    """Weights can be finite and yet so large that nothing finite comes out; such a model is neither kept nor exported.

    Each worker looks at the loss of one of the step's bins.
    """
    batch = data.micro_batch([bins[dist.get_rank() % len(bins)]], device)
    with torch.no_grad():
        total = torch.stack([summed_loss(model, batch), torch.tensor(float(len(batch.targets_S)), device=device)])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    _stop_unless_sound(f"after step {step}", saved, loss_sum / tokens)


def _what_stays(saved: int) -> str:
    kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint before it"
    return (
        f"stopped: nothing is exported, {kept}. A resume does the same again: a lower learning_rate or other data is "
        "another run, with another output_dir or --if-exists overwrite"
    )


def learning_rate_at(step: int, num_steps: int, recipe: TrainRecipe) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then a cosine that ends at zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def backward(
    model: PreTrainedModel, batch: MicroBatch, supervised: int, world_size: int, *, counts: bool = True
) -> torch.Tensor:
    """Forward and backward of one micro-batch; returns its summed loss, without gradient.

    The gradient is that of loss_sum / (supervised tokens of the whole global batch). FSDP averages gradients over the
    workers, so the loss is scaled by their number. A worker without bins runs one that does not count, with weight
    zero, because all workers meet in every layer.
    """
    loss = summed_loss(model, batch)
    (loss * (world_size / supervised if counts else 0.0)).backward()
    return loss.detach() if counts else loss.detach() * 0
