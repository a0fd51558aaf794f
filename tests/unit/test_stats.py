from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from janus_ray.stats import Estimate, mean_with_interval, paired_difference, steering_gain, two_decimals

# Quantiles of Student's t at 97.5 % from a printed table, by degrees of freedom.
T = {1: 12.7062, 2: 4.30265, 3: 3.18245}


def test_the_clustered_interval_by_hand():
    # mean 3; cluster residual sums: a -2-1 = -3, b 0+3 = 3; SE = sqrt(2/1 (9 + 9)) / 4 = 1.5
    estimate = mean_with_interval([1, 2, 3, 6], ["a", "a", "b", "b"])
    assert (estimate.mean, estimate.n, estimate.clusters) == (3.0, 4, 2)
    assert (estimate.low, estimate.high) == pytest.approx((3 - T[1] * 1.5, 3 + T[1] * 1.5), rel=1e-5)


def test_three_clusters_of_unlike_sizes_by_hand():
    # mean 3; residual sums: a -1, b 0+1 = 1, c -2+0+2 = 0; SE = sqrt(3/2 (1 + 1 + 0)) / 6
    estimate = mean_with_interval([2, 3, 4, 1, 3, 5], ["a", "b", "b", "c", "c", "c"])
    half_width = T[2] * np.sqrt(3) / 6
    assert (estimate.mean, estimate.n, estimate.clusters) == (3.0, 6, 3)
    assert (estimate.low, estimate.high) == pytest.approx((3 - half_width, 3 + half_width), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1, 5), min_size=2, max_size=40))
def test_with_one_score_per_cluster_it_is_the_interval_of_the_t_test(values):
    estimate = mean_with_interval(values, list(range(len(values))))
    error = scipy_stats.sem(values)
    quantile = scipy_stats.t.ppf(0.975, len(values) - 1)
    assert estimate.high - estimate.low == pytest.approx(2 * quantile * error, abs=1e-9)


def cr1_interval_of_a_regression_on_a_constant(values, clusters):
    """The textbook's way: bread, meat, small-sample factor, quantile."""
    design = np.ones((len(values), 1))
    groups = sorted(set(clusters.tolist()))
    coefficients, *_ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ coefficients
    bread = np.linalg.inv(design.T @ design)
    meat = sum(np.outer(*[design[clusters == group].T @ residuals[clusters == group]] * 2) for group in groups)
    (n, k), g = design.shape, len(groups)
    variance = (bread @ meat @ bread)[0, 0] * g / (g - 1) * (n - 1) / (n - k)
    return scipy_stats.t.interval(0.95, g - 1, loc=coefficients[0], scale=np.sqrt(variance))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 5), st.integers(0, 5)), min_size=8, max_size=60))
def test_it_agrees_with_the_sandwich_estimator_of_a_regression_on_a_constant(pairs):
    values, clusters = np.array([value for value, _ in pairs]), np.array([cluster for _, cluster in pairs])
    estimate = mean_with_interval(values, clusters)
    if estimate.clusters == 1:
        assert estimate.low is None and estimate.high is None
    elif np.ptp(values) > 1e-6:
        expected = cr1_interval_of_a_regression_on_a_constant(values, clusters)
        assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("groups", [5, 60])
def test_the_interval_covers_the_truth_as_often_as_it_says(groups):
    """Clusters of three scores that share an offset; five of them would be covered 86 % of the time by CR0 and 1.96."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        offsets = generator.normal(0, 1, groups).repeat(3)
        values = 2 + offsets + generator.normal(0, 0.5, 3 * groups)
        estimate = mean_with_interval(values, np.arange(groups).repeat(3))
        hits += estimate.low <= 2 <= estimate.high
    assert 930 <= hits <= 970


def test_nothing_and_one_cluster_say_nothing_about_the_spread():
    assert mean_with_interval([], []) == Estimate(None, None, None, 0, 0)
    assert mean_with_interval([2, 4], ["a", "a"]) == Estimate(3.0, None, None, 2, 1)
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        mean_with_interval([1, 2], ["a"])


def test_paired_differences_use_the_items_that_both_have():
    left, right = {"i": 5.0, "j": 4.0, "only left": 1.0}, {"i": 2.0, "j": 3.0, "only right": 9.0}
    estimate = paired_difference(left, right, {"i": "p", "j": "q", "only left": "p"})
    # differences 3 and 1: mean 2, SE = sqrt(2/1 (1 + 1)) / 2 = 1
    assert (estimate.mean, estimate.n) == (2.0, 2)
    assert estimate.high == pytest.approx(2 + T[1], rel=1e-5)


def test_the_steering_gain_is_the_diagonal_against_the_rest():
    matrix = np.array([[5, 1, 2], [1, 4, 1], [2, 3, 3]], dtype=float)
    assert steering_gain(matrix) == pytest.approx(4 - 10 / 6)
    matrix[0, 0] = np.nan
    matrix[2, 1] = np.nan
    assert steering_gain(matrix) == pytest.approx(3.5 - 7 / 5)
    assert steering_gain(np.array([[5.0]])) is None
    assert steering_gain(np.full((2, 2), np.nan)) is None


@pytest.mark.parametrize(("value", "text"), [(-0.004, "0.00"), (-0.006, "-0.01"), (4.567, "4.57"), (5, "5.00")])
def test_two_decimals(value, text):
    assert two_decimals(value) == text
