"""One Ray cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from janus_ray.cluster import ray_cluster
from janus_ray.config import RayConfig


@pytest.fixture(scope="session", autouse=True)
def shared_ray_cluster() -> Iterator[None]:
    with ray_cluster(RayConfig(logical_cpus=16, object_store_gib=0.5), 8, "the test session"):
        yield
