"""What is found out about a Ray cluster without asking Ray, and how a job says it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from janus_ray import cluster
from janus_ray.cluster import _check_a_head_answers, _check_fits, _runtime_env
from janus_ray.errors import ConfigError
from janus_ray.heartbeat import Address, parse_address, why_no_head
from tests.loopback import Reply, loopback


@contextmanager
def silent_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://h:10001", "Ray Client is not used here; submit the job instead: python -m jobs.submit NAME"),
        ("http://h:8265", "is the address of a dashboard, which takes submitted jobs: python -m jobs.submit NAME"),
        ("https://h", "is the address of a dashboard"),
        ("anyscale://x", "expected host:port, or auto"),
        ("h:99999", "expected host:port, or auto"),
        ("h:", "expected host:port, or auto"),
        ("h:6379/x", "expected host:port, or auto"),
        ("h:٣", "expected host:port, or auto"),
        (f"{'x' * 70}.invalid:6379", "no Ray cluster answers there"),
    ],
)
def test_an_address_that_no_cluster_can_have_is_refused_in_one_line(address, said):
    with pytest.raises(ConfigError) as refused:
        _check_a_head_answers(address)
    assert str(refused.value).startswith(f"RAY_ADDRESS={address}: {said}")
    assert "\n" not in str(refused.value)


def test_what_listens_but_is_no_head_is_told_apart():
    with loopback(lambda *_: Reply()) as web:
        port = int(web.url.split(":")[2].split("/")[0])
        with pytest.raises(ConfigError, match=r"what listens there is not the head of a Ray cluster; its port is 6379"):
            _check_a_head_answers(f"127.0.0.1:{port}")
    with silent_port() as port:
        assert why_no_head(Address("127.0.0.1", port), timeout_s=0.1) == "what listens there said nothing for 0.1 s"


def test_auto_leads_to_a_cluster_that_has_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    # Nothing is known: Ray says so itself.
    _check_a_head_answers("auto")
    (tmp_path / "ray").mkdir()
    address = f"127.0.0.1:{closed_port()}"
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS=auto \({address}\): no Ray cluster answers there \(Conn"):
        _check_a_head_answers("auto")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:6379", Address("10.0.0.1", 6379)),
        ("[::1]:6379", Address("::1", 6379)),
        ("::1:6379", Address("::1", 6379)),
        ("head", None),
        (":6379", None),
        ("h:0", None),
        ("h:65536", None),
        ("h:-1", None),
        ("h: 1", None),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


def test_a_cluster_too_small_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"train needs 4 CPUs at once, this cluster has 2; ray\.wait_for_nodes_s"):
        _check_fits({"CPU": 2}, 4, 0, "train")
    # The job's own process holds one of them, which only the submitter knows.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", f'{{"metadata": {{"{cluster.ENTRYPOINT_CPUS}": "1.0"}}}}')
    _check_fits({"CPU": 5, "GPU": 1}, 4, 1, "train")
    with pytest.raises(ConfigError, match=r"4 CPUs at once besides the 1 of the job's own process \(--entrypoint-cpus"):
        _check_fits({"CPU": 4, "GPU": 1}, 4, 1, "train")


def test_workers_are_not_told_how_the_cluster_authenticates(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # What the submitter has set already must not be set twice.
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"DO_NOT_TRACK": "1"}}}')
    variables = _runtime_env()["env_vars"]
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not {"RAY_AUTH_MODE", "DO_NOT_TRACK"} & variables.keys()


WATCHED = """
import sys, time
from janus_ray import heartbeat
from janus_ray.heartbeat import Address, watched
heartbeat._INTERVAL_S = heartbeat._HEAD_GRACE_S = 0.05
head, own = (Address("127.0.0.1", int(port)) for port in sys.argv[1:3])
with watched(head, own, head_may_return=sys.argv[3] == "True", ending=lambda: sys.argv[4] == "True"):
    time.sleep(float(sys.argv[5]))
print("finished")
"""


def watch(head: int, own: int, *, head_may_return=True, ending=False, lasts_s=60.0) -> subprocess.CompletedProcess:
    arguments = [head, own, head_may_return, ending, lasts_s]
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_cluster_that_goes_is_one_line_and_ends_the_job():
    again = "; run the same command again, with --if-exists resume, to continue\n"
    with silent_port() as alive:
        gone = closed_port()
        own = watch(alive, gone)
        assert own.stderr == (
            f"error: Ray's own process on this machine (127.0.0.1:{gone}) has ended (connection refused){again}"
        )
        assert (own.returncode, own.stdout) == (2, "")
        head = watch(gone, alive)
        said = f"the head of the Ray cluster at 127.0.0.1:{gone} does not answer (connection refused)"
        assert (head.returncode, head.stderr) == (2, f"error: {said}{again}")
        assert head.stdout == f"ray: {said}; waiting up to 0.05 s for it\n"
        # Nothing is said of a cluster that is there, nor on the way out.
        for quiet in (watch(alive, alive, lasts_s=0.3), watch(gone, gone, ending=True, lasts_s=0.3)):
            assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "finished\n", "")
