"""The packed forward against plain transformers, document by document."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from janus_ray.chat import conversation, use_template
from janus_ray.errors import CheckpointError, DataError
from janus_ray.model_folder import load_tokenizer
from janus_ray.train.attention import IMPLEMENTATION, register
from janus_ray.train.bins import PackedBins, micro_batch
from janus_ray.train.families import load_config
from janus_ray.train.loop import backward, summed_loss
from janus_ray.train.prepare import _packed_table, audit_masks
from janus_ray.train.recipe import TrainRecipe
from tests.tiny import texts, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base):
    return use_template(load_tokenizer(base), "janus")


@pytest.fixture(scope="module")
def packed(encoder):
    encoded = [encoder.encode_example(conversation(t["system"], t["prompt"]), t["output"]) for t in texts(12)]
    table = pa.table(
        {
            "input_ids": [example.input_ids for example in encoded],
            "loss_mask": [[int(loss) for loss in example.loss_mask] for example in encoded],
        }
    )
    return _packed_table(table, 200)


def load(base, implementation):
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=implementation)


def plain_losses(model, packed):
    """Summed loss of each document alone, through transformers' own loss."""
    losses = []
    for row in packed.to_pylist():
        start = 0
        for length in row["document_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            mask = torch.tensor([row["loss_mask"][start : start + length]], dtype=torch.bool)
            labels = ids.masked_fill(~mask, -100)
            losses.append(model(input_ids=ids, labels=labels).loss * mask.sum())
            start += length
    return losses


def test_the_packed_loss_is_the_sum_of_the_documents_losses(base, packed):
    batch = micro_batch(packed.to_pylist(), torch.device("cpu"))
    ours = summed_loss(load(base, IMPLEMENTATION), batch)
    theirs = sum(plain_losses(load(base, "eager"), packed))
    assert len(packed) > 1
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert len(batch.targets_S) == sum(packed["num_supervised"].to_pylist())


def test_the_packed_gradient_is_that_of_the_documents(base, packed):
    ours, theirs = load(base, IMPLEMENTATION), load(base, "eager")
    summed_loss(ours, micro_batch(packed.to_pylist(), torch.device("cpu"))).backward()
    sum(plain_losses(theirs, packed)).backward()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(left.grad, right.grad, rtol=1e-3, atol=1e-4), name


def test_no_token_sees_another_document(base, packed):
    model = load(base, IMPLEMENTATION)
    rows = packed.to_pylist()[:1]
    batch = micro_batch(rows, torch.device("cpu"))
    first = rows[0]["document_lengths"][0]

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


def test_a_worker_without_bins_adds_nothing(base, packed, tmp_path):
    model = load(base, IMPLEMENTATION)
    bins = packed.to_pylist()
    assert backward(model, bins, [], 0, 10, 2, torch.device("cpu")) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_bins_are_read_back_by_index(packed, tmp_path):
    from janus_ray.store.tables import write_parquet

    write_parquet(tmp_path / "bins.parquet", packed, row_group_rows=16)
    bins = PackedBins(tmp_path / "bins.parquet")
    assert [bins[index] for index in range(len(bins))] == packed.to_pylist()
    lengths = [row["document_lengths"] for row in packed.to_pylist()]
    assert [each.tolist() for each in bins.document_lengths()] == lengths


def test_the_mask_audit_shows_one_example_and_refuses_wrong_ones(packed, encoder):
    shown = audit_masks(packed, encoder)
    assert "[/INST]' + loss on '" in shown
    assert shown.endswith("</s>'")
    for column, damage in (("loss_mask", lambda m: [1, *m[1:]]), ("input_ids", lambda ids: [*ids[:-1], 9])):
        rows = packed.to_pylist()
        rows[0][column] = damage(rows[0][column])
        with pytest.raises(DataError, match="mask audit"):
            audit_masks(pa.Table.from_pylist(rows, schema=packed.schema), encoder)


def test_a_base_model_that_cannot_be_trained_here_is_refused(base, tmp_path):
    def recipe(**changes):
        return TrainRecipe(collection="c", output_dir="o", **{"base_model": str(base), "max_length": 256, **changes})

    load_config(recipe())
    with pytest.raises(CheckpointError, match="512 positions, fewer than max_length = 1024"):
        load_config(recipe(max_length=1024))
    with pytest.raises(CheckpointError, match="base model"):
        load_config(recipe(base_model=str(tmp_path)))
