from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_ray.train.loop import learning_rate_at
from janus_ray.train.model import skeleton
from janus_ray.train.packing import make_plan, pack, share_of
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.throughput import ModelShape, model_shape, peak_flops, training_flops


@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_document_is_in_exactly_one_bin_and_no_bin_overflows(lengths):
    bins = pack(lengths, 64)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(0 < load <= 64 for load in loads)
    # Any-fit property: two bins that would fit into one never both stay open.
    assert all(a + b > 64 for i, a in enumerate(loads) for b in loads[i + 1 :]) or len(bins) < 2


def test_packing_by_hand():
    assert pack([5, 3, 6, 4, 2], 10) == [[2, 3], [0, 1, 4]]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 5))
def test_the_plan_uses_every_bin_once_per_epoch_and_depends_on_the_seed_only(num_bins, per_step, epochs, seed):
    plan = make_plan(num_bins, per_step, epochs, None, seed)
    stream = [index for step in plan.steps for index in step]
    for epoch in range(epochs):
        assert sorted(stream[epoch * num_bins : (epoch + 1) * num_bins]) == list(range(num_bins))
    assert all(len(step) == per_step for step in plan.steps[:-1])
    assert plan == make_plan(num_bins, per_step, epochs, None, seed)
    assert plan.sha256 == make_plan(num_bins, per_step, epochs, None, seed).sha256
    assert make_plan(num_bins, per_step, epochs, 1, seed).steps == plan.steps[:1]
    if num_bins > 8:
        assert plan.sha256 != make_plan(num_bins, per_step, epochs, None, seed + 1).sha256


@given(st.integers(1, 17), st.integers(1, 5), st.integers(1, 4))
def test_workers_share_a_step_without_overlap_and_meet_equally_often(num_bins, world_size, per_micro_batch):
    step = tuple(range(100, 100 + num_bins))
    shares = [share_of(step, rank, world_size, per_micro_batch) for rank in range(world_size)]
    assert sorted(index for share in shares for members in share for index in members) == list(step)
    assert len({len(share) for share in shares}) == 1
    assert all(len(members) <= per_micro_batch for share in shares for members in share)


def test_the_schedule_warms_up_linearly_and_ends_at_zero():
    recipe = TrainRecipe(collection="c", base_model="b", output_dir="o", learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, 104, recipe) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_at(4, 104, recipe) == 1.0
    assert learning_rate_at(54, 104, recipe) == pytest.approx(0.5)
    assert learning_rate_at(103, 104, recipe) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_flops_by_hand():
    # 6 * 60 * 5 tokens + the head's 6 * 40 * 4 supervised ones + 6 * 2 layers * 8 wide * (2^2 + 3^2)
    shape = ModelShape(body_parameters=60, head_parameters=40, attention_width=8, windows=(None, None))
    assert training_flops([2, 3], 4, shape) == 6 * 60 * 5 + 6 * 40 * 4 + 6 * 2 * 8 * 13
    # A window of 4: of 10 tokens in one layer 10^2 / 2 - 6^2 / 2 pairs, of 3 tokens all.
    windowed = replace(shape, windows=(None, 4))
    assert training_flops([10, 3], 0, windowed) == 6 * 60 * 13 + 12 * 8 * (109 + 109 - 36) / 2
    assert peak_flops("NVIDIA H200") == 989e12
    assert (peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe")) == (989e12, 756e12)
    assert peak_flops("AMD EPYC") is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_model_counts_heads_by_their_own_width_and_a_tied_table_as_the_head(tied):
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["qwen3"](
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=tied,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    )
    shape = model_shape(skeleton("base", config))
    # Per layer: queries and output 16 * 24 each, keys and values 16 * 12 each, three times 16 * 24, norms.
    layer = 2 * 16 * 24 + 2 * 16 * 12 + 3 * 16 * 24 + 2 * 16 + 2 * 6
    assert shape == ModelShape(2 * layer + 16, 50 * 16, 4 * 6, (None, 9))


def test_defaults_are_the_papers():
    recipe = TrainRecipe(collection="c", base_model="b", output_dir="o")
    assert (recipe.max_length, recipe.bins_per_step, recipe.epochs, recipe.learning_rate) == (8192, 32, 4, 5e-6)
    assert (recipe.warmup_steps, recipe.betas, recipe.weight_decay, recipe.max_grad_norm) == (10, (0.9, 0.999), 0, 1)


def test_decay_rates_that_divide_by_zero_are_refused():
    with pytest.raises(ValueError, match="less than 1"):
        TrainRecipe(collection="c", base_model="b", output_dir="o", betas=(0.9, 1.0))
