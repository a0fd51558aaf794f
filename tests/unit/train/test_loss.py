"""The packed forward against plain transformers, document by document."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from janus_ray.chat import conversation, use_template
from janus_ray.errors import CheckpointError, DataError
from janus_ray.model_folder import load_tokenizer
from janus_ray.train.attention import IMPLEMENTATION, register
from janus_ray.train.batches import micro_batch
from janus_ray.train.documents import audit_documents, in_words
from janus_ray.train.families import load_config
from janus_ray.train.loop import backward
from janus_ray.train.objectives import summed_loss
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import texts, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base):
    return use_template(load_tokenizer(base), "janus")


@pytest.fixture(scope="module")
def documents(encoder):
    encoded = [encoder.encode_example(conversation(t["system"], t["prompt"]), t["output"]) for t in texts(12)]
    return [(np.array(example.input_ids), np.array(example.loss_mask)) for example in encoded]


def load(base, implementation):
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=implementation)


def plain_losses(model, documents):
    """Summed loss of each document alone, through transformers' own loss."""
    losses = []
    for own_ids, own_mask in documents:
        ids, mask = torch.from_numpy(own_ids)[None], torch.from_numpy(own_mask)[None]
        losses.append(model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss * mask.sum())
    return losses


def test_the_packed_loss_is_the_sum_of_the_documents_losses(base, documents):
    batch = micro_batch(documents, torch.device("cpu"))
    ours = summed_loss(load(base, IMPLEMENTATION), batch)
    theirs = sum(plain_losses(load(base, "eager"), documents))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert len(batch.targets_S) == sum(mask.sum() for _, mask in documents)


def test_the_packed_gradient_is_that_of_the_documents(base, documents):
    ours, theirs = load(base, IMPLEMENTATION), load(base, "eager")
    summed_loss(ours, micro_batch(documents, torch.device("cpu"))).backward()
    sum(plain_losses(theirs, documents)).backward()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(left.grad, right.grad, rtol=1e-3, atol=1e-4), name


def test_no_token_sees_another_document(base, documents):
    model = load(base, IMPLEMENTATION)
    batch = micro_batch(documents[:4], torch.device("cpu"))
    first = len(documents[0][0])

    def logits(ids):
        return model(
            input_ids=ids,
            position_ids=batch.position_ids_1T,
            use_cache=False,
            document_ends_N=batch.document_ends_N,
            longest_document=batch.longest_document,
        ).logits

    changed = batch.input_ids_1T.clone()
    changed[0, :first] = (changed[0, :first] + 7) % 300
    before, after = logits(batch.input_ids_1T), logits(changed)
    assert torch.equal(before[0, first:], after[0, first:])
    assert not torch.allclose(before[0, :first], after[0, :first])


def test_a_worker_without_bins_adds_nothing(base, documents):
    model = load(base, IMPLEMENTATION)
    assert backward(model, micro_batch(documents[:1], torch.device("cpu")), 10, 2, counts=False) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_the_mask_audit_shows_one_example_and_refuses_wrong_ones(documents, encoder):
    shown = in_words(*documents[1], encoder)
    assert shown.startswith("'<s>[INST] You write for person 1.")
    assert "[/INST]' + loss on '" in shown
    assert shown.endswith("</s>'")
    ids, mask = (np.concatenate([part[side] for part in documents]) for side in (0, 1))
    lengths = np.array([len(part[0]) for part in documents])
    audit_documents(ids, mask, lengths, encoder)
    start = int(lengths[:5].sum())
    for array, place, value in ((mask, start, True), (ids, start + lengths[5] - 1, 9), (ids, start, 9)):
        damaged = array.copy()
        damaged[place] = value
        with pytest.raises(DataError, match=r"mask audit: a document is wrong: .*number 5\?"):
            audit_documents(damaged if array is ids else ids, damaged if array is mask else mask, lengths, encoder)


def test_a_base_model_that_cannot_be_trained_here_is_refused(base, tmp_path):
    def recipe(**changes):
        return TrainRecipe(collection="c", output_dir="o", **{"base_model": str(base), "max_length": 256, **changes})

    load_config(recipe())
    with pytest.raises(CheckpointError, match="512 positions, fewer than max_length = 1024"):
        load_config(recipe(max_length=1024))
    with pytest.raises(CheckpointError, match="base model"):
        load_config(recipe(base_model=str(tmp_path)))
