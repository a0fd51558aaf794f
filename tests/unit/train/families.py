"""Tiny random models of every family, for the table of what trains exactly."""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 5
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

# What people call it: model_type, and what its configuration says beyond SHAPE.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", UNTIED),
    "arcee": ("arcee", UNTIED),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere-2": ("cohere2", ALTERNATING),
    "cwm": ("cwm", {**ALTERNATING, "head_dim": 8, "rope_parameters": LLAMA3}),
    "ernie-4.5": ("ernie4_5", {"head_dim": 12}),
    "exaone-4": ("exaone4", ALTERNATING),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma-2": ("gemma2", {"head_dim": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9, **ALTERNATING}),
    "gemma-3-text": ("gemma3_text", {"head_dim": 12, "query_pre_attn_scalar": 9, **ALTERNATING}),
    "gemma-3-text-softcap": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0, **ALTERNATING}),
    "glm": ("glm", {"head_dim": 8}),
    "glm-4": ("glm4", {"head_dim": 8}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan-dense": ("hunyuan_v1_dense", {"head_dim": 8}),
    "llama-2": ("llama", UNTIED),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-3.2-tied": ("llama", {"rope_parameters": LLAMA3, "head_dim": 12, **TIED}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "ministral": ("ministral", {**ALTERNATING, "head_dim": 8}),
    "ministral-3": ("ministral3", {"head_dim": 8}),
    "mistral-v0.1-window": ("mistral", {"sliding_window": WINDOW}),
    "mistral-v0.2": ("mistral", {"sliding_window": None}),
    "mistral-nemo-head-dim": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo-2": ("olmo2", UNTIED),
    "olmo-3": ("olmo3", ALTERNATING),
    "phi-2": ("phi", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1}),
    "phi-3-mini-window": ("phi3", {"sliding_window": WINDOW}),
    "phi-3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "qwen-2": ("qwen2", TIED),
    "qwen-2.5-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, **UNTIED},
    ),
    "qwen-3": ("qwen3", {"head_dim": 12, **TIED}),
    "seed-oss": ("seed_oss", {"head_dim": 12, "attention_dropout": 0.1}),
    "smollm-2": ("llama", {**TIED, "num_key_value_heads": 1, "num_attention_heads": 2}),
    "smollm-3-nope": ("smollm3", {"no_rope_layers": [1, 0], **TIED}),
    "starcoder-2": ("starcoder2", {"sliding_window": WINDOW, "residual_dropout": 0.1, "use_bias": True}),
}


def config_of(family: str) -> Any:
    """The tiny configuration of one of `EXACT`."""
    from transformers import CONFIG_MAPPING

    kind, special = EXACT[family]
    return CONFIG_MAPPING[kind](**{**SHAPE, **special})


def write_base(folder: Any, config: Any) -> None:
    """A folder with a random model of a configuration, far enough from its initial values that everything matters."""
    import torch
    from transformers import AutoModelForCausalLM

    from janus_ray.train.weights import quiet_transformers

    # The initial values too are the same in every run and order. With some seeds the gradient of a single number
    # (Apertus has some) cancels to nearly nothing, and its rounding stands out; with this one none does.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with quiet_transformers():
        model.save_pretrained(folder)
