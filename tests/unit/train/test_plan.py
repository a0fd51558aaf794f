from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.train.loop import learning_rate_at
from janus_ray.train.model import skeleton
from janus_ray.train.plan import make_plan, pack, read_plan, share_of, write_plan
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


@given(st.lists(st.integers(1, 24), max_size=60))
def test_each_piece_goes_into_the_fullest_bin_with_room(lengths):
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [24 - sum(lengths[other] for other in members) for members in bins]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            bins.append([index])
        else:
            bins[min(fitting)[1]].append(index)
    assert pack(lengths, 24) == bins


def singles(lengths):
    return np.array(lengths), np.arange(len(lengths))[:, None]


def test_the_same_recipe_makes_the_same_steps_as_ever():
    """What the first release made of these lengths; a run of it and one of today train on the same."""
    source = random.Random(7)
    lengths = [min(512, max(3, int(source.lognormvariate(4.5, 0.8)))) for _ in range(3000)]
    plan = make_plan(*singles(lengths), 512, 8, 3, None, 5)
    steps = [[plan.documents_of(number).tolist() for number in step] for step in plan.bins_by_step]
    assert len(steps) == 260
    digest = hashlib.sha256(json.dumps(steps).encode()).hexdigest()
    assert digest == "521d13bc56c6e9934ab4b4322d82cd74e6c592381e055a844d5f67ef79786d48"


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 5))
def test_the_plan_uses_every_bin_once_per_epoch_and_depends_on_the_seed_only(num_bins, per_step, epochs, seed):
    def made(max_steps=None, seed=seed):
        return make_plan(*singles([8] * num_bins), 8, per_step, epochs, max_steps, seed)

    plan = made()
    assert len(plan.bins) == num_bins
    stream = plan.bins_by_step.flat.tolist()
    for epoch in range(epochs):
        assert sorted(stream[epoch * num_bins : (epoch + 1) * num_bins]) == list(range(num_bins))
    assert all(len(step) == per_step for step in list(plan.bins_by_step)[:-1])
    assert plan.sha256 == made().sha256
    assert len(made(max_steps=1)) == 1
    assert made(max_steps=1).bins_by_step[0].tolist() == plan.bins_by_step[0].tolist()
    if num_bins > 8:
        assert plan.sha256 != made(seed=seed + 1).sha256


def test_a_pair_stays_together_and_takes_the_room_of_both(tmp_path):
    lengths = np.array([5, 3, 4, 4, 2, 1, 9])
    pairs = np.array([[0, 1], [3, 2], [5, 4]])
    plan = make_plan(lengths, pairs, 11, 2, 1, None, 0, roles=("chosen", "rejected"))
    # 8 + 3 fill a bin; the other 8 has one of its own. Document 6 is in no pair.
    assert sorted(plan.documents_of(number).tolist() for number in range(2)) == [[0, 1, 5, 4], [3, 2]]
    assert sorted(group.documents for step in plan.steps for group in step) == [(0, 1), (3, 2), (5, 4)]
    assert sorted(plan.per_bin(lengths).tolist()) == [8, 11]
    write_plan(plan, tmp_path / "plan.npz")
    again = read_plan(tmp_path / "plan.npz")
    assert (again.roles, again.sha256) == (("chosen", "rejected"), plan.sha256)
    assert list(again.steps) == list(plan.steps)


@given(st.binary(max_size=40), st.integers(0, 2000))
@settings(max_examples=40)
def test_a_damaged_plan_is_refused(content, position):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.npz"
        plan = make_plan(*singles([3, 4]), 8, 1, 1, None, 0)
        write_plan(plan, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + content + whole[position + len(content) :])
        try:
            assert read_plan(path).sha256 == plan.sha256
        except DataError as error:
            assert "plan.npz" in str(error)


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
