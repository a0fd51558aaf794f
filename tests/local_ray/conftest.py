"""One Ray cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from janus_ray.cluster import ray_cluster
from janus_ray.config import RayConfig


@pytest.fixture(scope="session", autouse=True)
def shared_ray_cluster() -> Iterator[None]:
    # Ray Train's controller looks at its workers this often; two seconds would be most of a tiny run.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    # Metrics every second instead of ten, for the tests that wait for them.
    os.environ.update(RAY_metrics_report_interval_ms="1000")
    with ray_cluster(RayConfig(logical_cpus=16, object_store_gib=0.5), 8, "the test session"):
        yield
