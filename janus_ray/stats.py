"""Means and intervals over clustered scores: pure functions on arrays, nothing else.

The unit of sampling is the cluster (here: the prompt), because the answers to one prompt are not independent.
Standard errors are cluster-robust (Miller 2024, arXiv 2411.00640, equation 4) with the small-sample factor that
regressions use (CR1; Cameron and Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section VI.A), and
intervals take Student's t with G - 1 degrees of freedom, G being the number of clusters (the same, section VI.D).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

INTERVAL = "95 %, Student t (prompts - 1 degrees of freedom), cluster-robust by prompt (CR1)"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval.

    `n` counts the scores averaged and `clusters` the prompts behind them; mean and bounds are None when there are
    none, the bounds also when one cluster says nothing about the spread.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int


def mean_with_interval(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> Estimate:
    """Mean of the values with a cluster-robust 95 % interval.

    SE = sqrt(G / (G - 1) * sum over the G clusters c of (sum over i in c of (x_i - mean))^2) / n. The CR1 factor
    G / (G - 1) * (n - 1) / (n - K) is G / (G - 1) here, because a mean is a regression on K = 1 constant. With clusters
    of size one this is the ordinary standard error, and the interval is that of the one-sample t test. One cluster says
    nothing about the spread between clusters: there is no interval then.

    Args:
        values: [n] scores.
        clusters: [n] the cluster of each score.

    Raises:
        ValueError: the lengths differ.
    """
    x = np.asarray(values, dtype=float)
    if len(x) != len(clusters):
        raise ValueError(f"{len(x)} values but {len(clusters)} clusters")
    if len(x) == 0:
        return Estimate(None, None, None, 0, 0)
    mean = float(x.mean())
    sums: dict[Hashable, float] = {}
    for residual, cluster in zip(x - mean, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(residual)
    if len(sums) == 1:
        return Estimate(mean, None, None, len(x), 1)
    groups = len(sums)
    variance = groups / (groups - 1) * sum(total**2 for total in sums.values()) / len(x) ** 2
    half_width = float(stdtrit(groups - 1, 0.975) * np.sqrt(variance))
    return Estimate(mean, mean - half_width, mean + half_width, len(x), groups)


def paired_difference(
    left: dict[Hashable, float], right: dict[Hashable, float], cluster_of: dict[Hashable, Hashable]
) -> Estimate:
    """Mean of left - right over the items that both have, with its cluster-robust 95 % interval.

    Args:
        left: score by item.
        right: score by item.
        cluster_of: the cluster of each item.
    """
    shared = sorted(left.keys() & right.keys(), key=str)
    return mean_with_interval([left[item] - right[item] for item in shared], [cluster_of[item] for item in shared])


def steering_gain(scores_AB: np.ndarray) -> float | None:
    """Steering gain of one prompt: mean of M[a, a] minus mean of M[a, b], a != b.

    Args:
        scores_AB: [k, k] square; M[a, b] is the score of the response written for values a under the rubrics of
            values b. NaN marks an unscored cell.

    Returns:
        The gain over the scored cells; None when either part has no scored cell.
    """
    own = np.eye(len(scores_AB), dtype=bool)
    diagonal, others = scores_AB[own], scores_AB[~own]
    diagonal, others = diagonal[~np.isnan(diagonal)], others[~np.isnan(others)]
    if len(diagonal) == 0 or len(others) == 0:
        return None
    return float(diagonal.mean() - others.mean())


def two_decimals(value: float) -> str:
    """The value as people read it, and never "-0.00"."""
    return f"{round(value, 2) + 0.0:.2f}"
