"""Fixtures of all tests, and the rules about machines: markers by folder, GPUs skipped or demanded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from janus_ray.env import set_quiet_defaults

set_quiet_defaults()
# On a busy machine everything is slow, and that is no failure.
settings.register_profile("janus_ray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("janus_ray")
os.environ["HF_HUB_OFFLINE"] = "1"
# How fast an example is made says something about the machine only.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by its folder, so that `-m local_ray` and the folder mean the same."""
    for item in items:
        folder = Path(item.path).relative_to(REPOSITORY / "tests").parts[0]
        if folder in ("local_ray", "e2e", "real", "gpu"):
            item.add_marker(folder)
        if folder == "gpu" and shutil.which("nvidia-smi") is None and os.environ.get("JANUS_EXPECT_GPU") != "1":
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU (JANUS_EXPECT_GPU=1 makes this a failure)"))


@pytest.fixture(autouse=True)
def _same_environment_afterwards() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def run_job_process():
    """Runs `python -m jobs.NAME ...` as a user would and returns the finished process."""

    def run(name: str, *arguments: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"jobs.{name}", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
