"""The policy as FSDP2 sees it: built without memory, sharded, filled, exported."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ray.chat import use_template
from janus_ray.errors import CheckpointError
from janus_ray.model_folder import load_tokenizer, save_tokenizer, write_template_record
from janus_ray.train.attention import IMPLEMENTATION, register
from janus_ray.train.recipe import TrainRecipe

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel


def load_config(recipe: TrainRecipe) -> PretrainedConfig:
    """The base model's configuration, if it can be trained here.

    Raises:
        CheckpointError: there is none, or it asks for what the packed attention does not do.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(recipe.base_model)
    except (OSError, ValueError) as error:
        raise _not_loaded(recipe, error) from None
    window = getattr(config, "sliding_window", None)
    if window is not None and window < recipe.max_length:
        raise CheckpointError(
            f"base model {recipe.base_model}: sliding window of {window} tokens, shorter than max_length = "
            f"{recipe.max_length}; packed attention has no window"
        )
    if getattr(config, "tie_word_embeddings", False):
        raise CheckpointError(f"base model {recipe.base_model}: tied embeddings cannot be sharded here yet")
    if recipe.max_length > config.max_position_embeddings:
        raise CheckpointError(
            f"base model {recipe.base_model}: {config.max_position_embeddings} positions, fewer than max_length = "
            f"{recipe.max_length}"
        )
    return config


def build_sharded(recipe: TrainRecipe, mesh: DeviceMesh, device: torch.device) -> PreTrainedModel:
    """The base model with its weights, one FSDP2 unit per block and one for the rest.

    Only rank 0 reads the weights; the others receive their shards. Master weights are FP32.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    register()
    config = load_config(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    param_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=recipe.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=recipe.reshard_after_forward)
    model.to_empty(device=device)
    # Its frequencies are a buffer that no state dict holds.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    weights: dict[str, Any] = dict(_full_weights(recipe)) if dist.get_rank() == 0 else {}
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    return model


def export(model: PreTrainedModel, recipe: TrainRecipe, folder: Path) -> None:
    """Writes a Hugging Face folder: weights, configuration, tokenizer, chat template, defaults, template hash.

    All ranks must call it; rank 0 writes, beside the target first.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import AutoModelForCausalLM, GenerationConfig

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() != 0:
        return
    dtype = getattr(torch, recipe.export_dtype)
    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    tokenizer = encoder.tokenizer
    ends = sorted({end for end in (tokenizer.eos_token_id, encoder.end_id) if end is not None})
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(recipe), dtype=dtype)
    with _written_beside(folder) as partial:
        skeleton.save_pretrained(partial, state_dict={name: tensor.to(dtype) for name, tensor in weights.items()})
        save_tokenizer(tokenizer, partial)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(partial)
        write_template_record(partial, encoder.probe_sha256(), recipe.chat_template)


def _full_weights(recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(recipe.base_model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _not_loaded(recipe, error) from None
    return model.state_dict()


def _not_loaded(recipe: TrainRecipe, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0]
    return CheckpointError(f"base model {recipe.base_model}: neither a folder here nor on the hub: {reason}")


@contextmanager
def _written_beside(folder: Path) -> Generator[Path]:
    """A temporary folder that takes the target's place once it is complete."""
    import shutil

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
