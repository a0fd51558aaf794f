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
from tests.s3 import S3, s3_server

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
def s3_session() -> Iterator[S3]:
    """A real S3 server for the session, which this process and what it starts use from here on."""
    with s3_server() as server:
        # For the session, so that the workers of a cluster that is started later have it too.
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def s3(s3_session: S3) -> Iterator[S3]:
    """The session's S3 server, without faults at the test's beginning and end."""
    os.environ.update(s3_session.environment)
    s3_session.heal()
    yield s3_session
    s3_session.heal()


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
