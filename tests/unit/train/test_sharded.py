"""The model under FSDP2, in a process group of one: tied weights, gradients, one step, the way out and back.

With two workers the same runs in tests/local_ray/train.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from janus_ray.train.batches import micro_batch
from janus_ray.train.checkpoint import Checkpoints, load_checkpoint, newest_healthy
from janus_ray.train.model import build_sharded, export
from janus_ray.train.objectives import summed_loss
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import write_model

CPU = torch.device("cpu")
MODELS = {
    "gemma-2-tied": (
        "gemma2",
        {"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {}),
}
DOCUMENTS = [
    (np.array([5 + 7 * position % 200 for position in range(start, start + 12)]), np.arange(12) >= 4)
    for start in (0, 12)
]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def plain_gradient(folder):
    """The gradient of the documents in plain transformers, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    loss = 0.0
    for own_ids, own_mask in DOCUMENTS:
        ids, mask = torch.from_numpy(own_ids)[None], torch.from_numpy(own_mask)[None]
        loss = loss + model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss * mask.sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_step_is_a_plain_one_and_what_is_exported_says_so(name, tmp_path):
    kind, special = MODELS[name]
    base = write_model(tmp_path / "base", kind=kind, special=special)
    recipe = TrainRecipe(
        collection="c",
        output_dir="o",
        base_model=str(base),
        max_length=64,
        precision="fp32",
        export_dtype="float32",
    )
    model = build_sharded(recipe, init_device_mesh("cpu", (1,)), CPU).train()
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    assert len(units) == model.config.num_hidden_layers + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    summed_loss(model, micro_batch(DOCUMENTS, CPU)).backward()

    ours, theirs = dict(model.named_parameters()), plain_gradient(base)
    assert list(ours) == list(theirs)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(ours)
    assert is_tied(model) == (name != "mistral")
    for key, gradient in theirs.items():
        torch.testing.assert_close(whole(ours[key].grad), gradient, rtol=1e-4, atol=1e-4, msg=key)
    optimizer.step()

    export(model, recipe, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert is_tied(again) == (name != "mistral")
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, whole(ours[key])), key
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) == (name == "mistral")  # noqa: SIM118

    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(model, optimizer, {"step": 1})
        # What is written is the state at that moment, whatever training does meanwhile.
        kept = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        checkpoints.wait()
        for key, parameter in model.named_parameters():
            with torch.no_grad():
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(kept[key])
    fresh = build_sharded(recipe, init_device_mesh("cpu", (1,)), CPU)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    checkpoint, _ = newest_healthy(tmp_path)
    load_checkpoint(fresh, fresh_optimizer, checkpoint, {"step": 0})
    for (key, left), right in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(whole(left), whole(right)), key
        moments, restored = optimizer.state[left], fresh_optimizer.state[right]
        assert torch.equal(whole(moments["exp_avg"]), whole(restored["exp_avg"])), key
    assert is_tied(fresh) == (name != "mistral")
