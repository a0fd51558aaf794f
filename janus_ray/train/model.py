"""The policy as FSDP2 sees it: built without memory, sharded, filled, exported."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from upath import UPath

from janus_ray.chat import ChatEncoder, use_template
from janus_ray.errors import CheckpointError
from janus_ray.model_folder import TEMPLATE_FILE, load_tokenizer, save_tokenizer, write_template_record
from janus_ray.store.fetch import upload_folder
from janus_ray.store.files import delete_files, files_below
from janus_ray.store.location import is_local, location
from janus_ray.train.attention import IMPLEMENTATION, register
from janus_ray.train.families import NONSENSE, dropouts, in_one_line, load_config, stated_config
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.weights import check_weights, quiet_transformers, read_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_base_model(recipe: TrainRecipe) -> None:
    """Refuses a base model that would not train exactly, or not at all. Reads no weights and starts nothing.

    Raises:
        CheckpointError: its configuration, tokenizer or weights are not as they must be; one line.
    """
    config = load_config(recipe)
    model = skeleton(recipe.base_model, config)
    check_tokenizer(recipe.base_model, load_tokenizer(recipe.base_model), config)
    check_weights(recipe.base_model, model)
    if stated_config(recipe.base_model).get("auto_map"):
        print(
            f"train: {recipe.base_model}: its own code (auto_map) is not run; {type(model).__name__} is transformers'"
        )
    if rates := dropouts(config):
        given = ", ".join(f"{name} = {value}" for name, value in rates.items())
        print(f"train: {recipe.base_model}: trained without its dropout ({given})")


def check_tokenizer(base_model: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuses a tokenizer that has tokens without an embedding.

    Raises:
        CheckpointError: there are some, and others than the placeholders of images and sounds, which no text becomes
            (Gemma 3 without its eyes still has that of an image).
    """
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    beyond = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= config.vocab_size and token not in placeholders
    )
    if beyond:
        raise CheckpointError(
            f"base model {base_model}: the tokenizer has {len(beyond)} token(s) beyond the embedding of "
            f"{config.vocab_size} (vocab_size); the first is {beyond[0][1]!r} with id {beyond[0][0]}"
        )


def skeleton(base_model: str, config: PretrainedConfig, attention: str = IMPLEMENTATION) -> PreTrainedModel:
    """The model without memory for its parameters, and without dropout: a run has to give the same on any workers.

    Buffers are made in earnest, because no state dict brings back those that are not persistent.

    Raises:
        CheckpointError: transformers cannot build a model of this configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    register()
    trained = copy.deepcopy(config)
    for name in dropouts(config):
        setattr(trained, name, 0.0)
    try:
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model = AutoModelForCausalLM.from_config(trained, dtype=torch.float32, attn_implementation=attention)
    except NONSENSE as error:
        raise CheckpointError(f"base model {base_model}: cannot be built: {in_one_line(error)}") from None
    # Each assignment to a module made a parameter of its own.
    model.tie_weights(recompute_mapping=False)
    if not blocks_of(model):
        raise CheckpointError(f"base model {base_model}: {type(model).__name__} has no blocks to shard")
    return model


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated blocks, by what transformers says must stay on one device."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def build_sharded(recipe: TrainRecipe, mesh: DeviceMesh, device: torch.device) -> PreTrainedModel:
    """The base model with its weights, one FSDP2 unit per block and one for the rest.

    Only rank 0 reads the weights; the others receive their shards. Master weights are FP32.
    """
    model = skeleton(recipe.base_model, load_config(recipe))
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    param_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=recipe.reshard_after_forward)
    # Tied weights are in here both times: they belong to one unit.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=recipe.reshard_after_forward)
    materialise(model, device)
    weights: dict[str, Any] = {}
    if dist.get_rank() == 0:
        weights = dict(read_weights(recipe.base_model, load_config(recipe)))
    set_model_state_dict(
        model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    return model


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Gives the parameters memory, not yet filled, and moves the buffers to the device."""
    assert not any(buffer.is_meta for buffer in model.buffers()), "nothing would fill such a buffer"
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    # Each module was given a tensor of its own.
    model.tie_weights(recompute_mapping=False)


def export(model: PreTrainedModel, recipe: TrainRecipe, folder: Path | UPath) -> None:
    """Writes a Hugging Face folder: weights, configuration, tokenizer, chat template, defaults, template hash.

    All ranks must call it; rank 0 writes, beside the target first.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() != 0:
        return
    dtype = getattr(torch, recipe.export_dtype)
    encoder = use_template(load_tokenizer(recipe.base_model), recipe.chat_template)
    with _written_beside(location(folder)) as partial:
        write_weights(recipe, weights, dtype, partial)
        save_tokenizer(encoder.tokenizer, partial)
        generation_defaults(recipe.base_model, encoder).save_pretrained(partial)
        write_template_record(partial, encoder.probe_sha256(), recipe.chat_template)


def write_weights(recipe: TrainRecipe, weights: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Writes weights and configuration; of tied weights the one that the base model's own files would hold."""
    # The base model's configuration, dropout included, with the new type.
    config = load_config(recipe)
    config.dtype = dtype
    if hasattr(config, "auto_map"):
        # It points to code that does not come along.
        del config.auto_map
    model = skeleton(recipe.base_model, config, "sdpa")
    model.config = config
    written = {name: tensor.to(dtype) for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=written)


def generation_defaults(base_model: str, encoder: ChatEncoder) -> GenerationConfig:
    """Where generation ends: at the tokenizer's end, at the one that training taught, and where the base model ended.

    Its defaults of sampling are left out: what a request leaves open would depend on the base model.
    """
    from transformers import GenerationConfig

    stated: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        stated = json.loads((Path(base_model) / "generation_config.json").read_bytes())
    more = stated.get("eos_token_id") if isinstance(stated, dict) else None
    tokenizer = encoder.tokenizer
    ends = [tokenizer.eos_token_id, encoder.end_id, *(more if isinstance(more, list) else [more])]
    unique = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=unique[0] if len(unique) == 1 else unique,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _written_beside(folder: UPath) -> Generator[Path]:
    """A temporary folder that takes the target's place once it is complete.

    For an object storage it lies in the temporary folder of this machine, because transformers writes nowhere else.
    """
    if not is_local(folder):
        with tempfile.TemporaryDirectory(prefix="janus_ray-") as partial:
            yield Path(partial)
            delete_files(files_below(folder))
            upload_folder(Path(partial), folder, last=[TEMPLATE_FILE])
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
