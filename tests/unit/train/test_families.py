"""The table family x {exact, refused}: `pytest -v tests/unit/train/test_families.py` prints it.

Exact: loss and gradient of packed documents, some longer than the sliding window, equal plain transformers (eager
attention, one document at a time), from the skeleton that training shards; what is exported computes the same.
"""

from __future__ import annotations

import json
from itertools import accumulate

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from janus_ray.train import families
from janus_ray.train.attention import IMPLEMENTATION
from janus_ray.train.batches import micro_batch
from janus_ray.train.model import blocks_of, materialise, skeleton, write_weights
from janus_ray.train.objectives import summed_loss
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.weights import check_weights, quiet_transformers, read_weights
from tests.unit.train.families import EXACT, WINDOW, config_of, write_base

# Two bins; the longest document is much longer than the window.
BINS = [[3, 17], [WINDOW + 1, WINDOW]]
CPU = torch.device("cpu")


def recipe_for(base, **changes):
    values = {"collection": "c", "output_dir": "o", "base_model": str(base), "max_length": 32, **changes}
    return TrainRecipe.model_validate(values)


def some_documents():
    generator = torch.Generator().manual_seed(1)
    documents = []
    for lengths in BINS:
        ids = torch.randint(3, 96, (sum(lengths),), generator=generator).numpy()
        for end, length in zip(accumulate(lengths), lengths, strict=True):
            mask = np.arange(length) >= max(1, length // 3)
            documents.append((ids[end - length : end], mask))
    return documents


def plain_loss(model, documents):
    """transformers' own loss, one document at a time, summed over the supervised tokens."""
    total = torch.zeros(())
    for own_ids, own_mask in documents:
        ids, mask = torch.from_numpy(own_ids)[None], torch.from_numpy(own_mask)[None]
        total = total + model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss * mask.sum()
    return total


def loaded(base, **options):
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def ours(base):
    """The base model as a worker builds it, without sharding."""
    recipe = recipe_for(base)
    config = families.load_config(recipe)
    model = skeleton(str(base), config)
    check_weights(str(base), model)
    materialise(model, CPU)
    model.load_state_dict(read_weights(str(base), config), strict=True)
    return model


@pytest.mark.parametrize("family", EXACT)
def test_exact(family, tmp_path):
    write_base(tmp_path, config_of(family))
    # Evaluation mode: without dropout, as we train.
    theirs = loaded(tmp_path, attn_implementation="eager").eval()
    model = ours(tmp_path).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.config._attn_implementation == IMPLEMENTATION

    documents = some_documents()
    loss, expected = summed_loss(model, micro_batch(documents, CPU)), plain_loss(theirs, documents)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(gradients)
    for name, parameter in model.named_parameters():
        scale = gradients[name].grad.abs().max()
        assert scale > 0, name
        assert (parameter.grad - gradients[name].grad).abs().max() < 1e-4 * scale, name

    buffers = dict(theirs.named_buffers())
    assert {name for name, _ in model.named_buffers()} == set(buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert len(blocks_of(model)) == model.config.num_hidden_layers

    exported = tmp_path / "exported"
    write_weights(recipe_for(tmp_path), model.state_dict(), torch.float32, exported)
    again, config = loaded(exported, attn_implementation="eager").eval(), AutoConfig.from_pretrained(exported)
    ids = torch.from_numpy(np.concatenate([documents[0][0], documents[1][0]]))[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    stated = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == stated.to_diff_dict()
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"


def test_the_table_holds_every_family_that_is_let_in():
    assert {kind for kind, _ in EXACT.values()} == set(families.EXACT)
