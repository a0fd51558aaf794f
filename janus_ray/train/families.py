"""Which base models train exactly when documents are packed, and in one line why another does not.

A family is exact if loss and gradient of packed documents equal those of plain transformers with one document at a
time. tests/unit/train/test_families.py shows it for each of `EXACT`; nothing else is trained, because a model that
mixes tokens outside its attention, or counts positions by itself, would train on other data in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ray.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from janus_ray.train.recipe import TrainRecipe

# Values of `model_type`.
EXACT = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)

# Why a family that people may well bring is not among them. What a configuration itself tells is found by `_why_not`.
_WHY_NOT = {
    "bloom": "ALiBi counts positions across documents",
    "mpt": "ALiBi counts positions across documents",
    "falcon": "its attention takes no document borders",
    "gpt2": "learned absolute positions",
    "gpt_bigcode": "learned absolute positions",
    "gpt_neo": "learned absolute positions",
    "opt": "learned absolute positions",
    "gpt_oss": "attention sinks and a mixture of experts",
    "granite_swa": "attention sinks",
    "stablelm": "its attention takes no document borders",
    "nemotron": "its attention takes no document borders",
}
_WRAPPED = ("text_config", "vision_config", "audio_config", "thinker_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_STATES = (
    "state_size",
    "mamba_d_state",
    "ssm_cfg",
    "conv_kernel",
    "conv_L_cache",
    "linear_conv_kernel_dim",
    "attention_hidden_size",
)
_LAYERS = {"full_attention", "sliding_attention"}
# What transformers raises on values that make no sense.
NONSENSE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError)
# Of the GPU's variable-length kernel.
_MAX_GPU_HEAD_DIM = 256


def load_config(recipe: TrainRecipe) -> PretrainedConfig:
    """The base model's configuration, if it can be trained here.

    Raises:
        CheckpointError: there is none, or it asks for what packed training does not do exactly.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    stated = stated_config(recipe.base_model)
    if (reason := _why_not(stated)) is not None:
        raise _refused(recipe.base_model, reason)
    try:
        config = AutoConfig.from_pretrained(recipe.base_model, trust_remote_code=False)
        reason = _why_not_built(config) or _why_not_at(config, recipe)
    # Whatever transformers makes of values that are none: it says so in many types.
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise _refused(recipe.base_model, f"config.json: {in_one_line(error)}") from None
    if reason is not None:
        raise _refused(recipe.base_model, reason)
    return config


def stated_config(base_model: str) -> dict[str, Any]:
    """What config.json says.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = Path(base_model) / "config.json"
    try:
        stated = json.loads(file.read_bytes())
    except OSError:
        raise _refused(base_model, "no model folder (no config.json that can be read)") from None
    except (ValueError, RecursionError):
        raise _refused(base_model, "config.json is no JSON") from None
    if not isinstance(stated, dict):
        raise _refused(base_model, "config.json is no JSON object")
    return stated


def dropouts(config: PretrainedConfig) -> dict[str, float]:
    """The configuration's dropout rates that are not zero. None is applied: see `model.skeleton`."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, int | float) and value
    }


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """For each layer how many tokens one of them sees, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def in_one_line(error: Exception) -> str:
    """An error of a library, on one line and not too long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _refused(base_model: str, reason: str) -> CheckpointError:
    return CheckpointError(f"base model {base_model}: {reason}")


def _why_not(stated: dict[str, Any]) -> str | None:
    """What speaks against a configuration before transformers reads it."""
    from transformers import CONFIG_MAPPING

    for quantised in (stated.get("quantization_config"), stated.get("compression_config")):
        if quantised is None:
            continue
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        return f"quantised weights ({method or 'quantization_config'}); expected bfloat16, float16 or float32"
    kind = stated.get("model_type")
    if not isinstance(kind, str) or not kind:
        return "its config.json names no model_type"
    if kind in EXACT:
        return None
    if stated.get("auto_map") and kind not in CONFIG_MAPPING:
        return f"model type {kind!r} brings its own code (auto_map), which is never run"
    return f"model type {kind!r} is not trained here: {_why_not_the_family(kind, stated)}"


def _why_not_the_family(kind: str, stated: dict[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if kind in _WHY_NOT:
        return _WHY_NOT[kind]
    if any(isinstance(stated.get(name), dict) for name in _WRAPPED) or "Conditional" in CAUSAL.get(kind, ""):
        return "a wrapper of several models; expected the text model in it, with its own folder"
    if stated.get("is_encoder_decoder"):
        return "an encoder with a decoder; expected a decoder only"
    if kind in MASKED:
        return "an encoder; expected a decoder only"
    if kind not in CAUSAL:
        return "no causal language model that transformers knows"
    if any(stated.get(name) for name in _EXPERTS):
        return "a mixture of experts, whose load-balancing loss is not trained here"
    if any(name in stated for name in _STATES):
        return "a state or a convolution carries over from one document to the next"
    if not isinstance(stated.get("max_position_embeddings"), int):
        return "its configuration names no number of positions (max_position_embeddings)"
    return f"loss and gradient of packed documents are known to be exact for {', '.join(EXACT)}"


def _why_not_built(config: PretrainedConfig) -> str | None:
    """What speaks against a configuration of an exact family, whatever the recipe."""
    if config.model_type not in EXACT:
        # transformers reads some types as others, by what else a configuration says.
        return f"is read as model type {config.model_type!r}, which is not trained here"
    if config.is_heterogeneous:
        return "layers with settings of their own (per_layer_config)"
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "names no number of positions" if name == "max_position_embeddings" else "cannot be built"
            return f"its configuration {what} ({name} = {value!r})"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention in both directions (use_bidirectional_attention)"
    others = set(getattr(config, "layer_types", None) or []) - _LAYERS
    if others:
        return f"layers of other kinds than {', '.join(sorted(_LAYERS))}: {', '.join(sorted(map(str, others)))}"
    if any(window is not None and (not isinstance(window, int) or window < 1) for window in attention_windows(config)):
        return f"sliding_window = {getattr(config, 'sliding_window', None)!r}, expected a number of tokens from 1 on"
    return None


def _why_not_at(config: PretrainedConfig, recipe: TrainRecipe) -> str | None:
    """What speaks against a configuration at this recipe's length and on its devices."""
    if recipe.max_length > config.max_position_embeddings:
        return f"{config.max_position_embeddings} positions, fewer than max_length = {recipe.max_length}"
    for parameters in _rope_parameters(config):
        short = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if parameters.get("rope_type") == "longrope" and recipe.max_length > short:
            return (
                f"longrope turns other frequencies on for a text of more than {short} tokens, so that packed documents "
                f"would change one another; expected max_length up to {short}, not {recipe.max_length}"
            )
    if not recipe.use_gpu:
        return None
    if getattr(config, "attn_logit_softcapping", None):
        return "soft caps of attention scores (attn_logit_softcapping), which the GPU's kernel has not; use_gpu = false"
    if head_dim(config) > _MAX_GPU_HEAD_DIM or head_dim(config) % 8:
        return f"heads of width {head_dim(config)}; the GPU's kernel takes multiples of 8 up to {_MAX_GPU_HEAD_DIM}"
    return None


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """One set for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return nested or [parameters]
