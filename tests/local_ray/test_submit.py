"""Jobs on a real cluster with a dashboard and a token: sent, left, stopped, continued, and finished once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from janus_ray.cluster import _wait_until_it_fits
from janus_ray.config import RayConfig
from janus_ray.errors import ConfigError
from janus_ray.miniature import teacher
from janus_ray.miniature.server import TEACHER
from janus_ray.miniature.world import instructions
from janus_ray.store.files import write_jsonl
from janus_ray.store.folder import read_manifest
from tests.loopback import Reply, chat_reply, loopback

REPOSITORY = Path(__file__).parents[2]
TOKEN = "a-token-of-this-test-and-of-nobody-else"


def free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster(NamedTuple):
    url: str
    storage: Path
    environment: dict[str, str]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A head that asks for a token and knows where the shared storage is, as cluster.yaml starts one."""
    storage = tmp_path_factory.mktemp("storage")
    dashboard, agent, client = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Not below pytest's own folder, whose name is too long for sockets.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        command = ["ray", "start", "--head", "--block", "--num-cpus=8", "--object-store-memory=100000000", "--port=0"]
        command += [f"--temp-dir={folder}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}"]
        head = subprocess.Popen(
            command,
            env={**environment, "JANUS_STORAGE": str(storage)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert head.stdout is not None
            said = ""
            for line in head.stdout:
                said += line
                if "Ray runtime started" in line:
                    break
            else:
                raise AssertionError(said)
            yield Cluster(f"http://127.0.0.1:{dashboard}", storage, environment)
        finally:
            ours = psutil.Process(head.pid).children(recursive=True)
            for process in (head, *ours):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=30)
            head.wait(30)
            head.stdout.close()


def test_a_job_is_left_stopped_continued_and_finished_once(cluster, tmp_path):
    write_jsonl(cluster.storage / "in" / "some" / "rows.jsonl", instructions()[:6])
    source = 'path = "in/some/rows.jsonl"\nname = "miniature"\nsource_column = "family"\n'
    (tmp_path / "small.toml").write_text(f"[[sources]]\n{source}")
    asked, go = threading.Event(), threading.Event()

    def answer(n: int, body: dict) -> Reply:
        asked.set()
        go.wait(60)
        return chat_reply(teacher.answer(body["messages"], body["seed"]))

    with loopback(answer, models=(TEACHER,)) as server:
        arguments = ["jobs/recipes/miniature_collect.toml", "--set", "output_dir=out/small"]
        arguments += ["--set", f"teacher.base_url={server.url}", "--set", "teacher.max_concurrency=4"]
        # A recipe that does not lie in what is sent; the storage is the cluster's to know.
        submit = [sys.executable, "-m", "jobs.submit", "collect", *arguments[:1], str(tmp_path / "small.toml")]
        submit += [*arguments[1:], "--address", cluster.url]

        first = subprocess.Popen(submit, cwd=REPOSITORY, env=cluster.environment, stdout=-1, stderr=-1, text=True)
        assert asked.wait(120), first.stderr.read()
        first.send_signal(signal.SIGINT)
        left, why = first.communicate(timeout=60)
        name = re.search(r"janus-collect-[0-9a-f]{12}", left)[0]
        assert first.returncode == 130
        assert f"submit: {name} goes on; the same command follows it again" in why

        # Followed once more, and stopped by somebody else meanwhile.
        again = subprocess.Popen(submit, cwd=REPOSITORY, env=cluster.environment, stdout=-1, stderr=-1, text=True)
        assert f"{name} runs at {cluster.url}, with the settings it was started with" in again.stdout.readline()
        stopped = cluster.run("ray", "job", "stop", "--address", cluster.url, name)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        log, _ = again.communicate(timeout=60)
        assert again.returncode == 143 and log.endswith(f"submit: {name} was stopped; the same command continues it\n")
        assert log.count("collect: 6 instructions x 3 preference sets") == 1

        go.set()
        done = cluster.run(*submit)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"submit: {name}-2 at {cluster.url}" in done.stdout and "the attempt before: stopped" in done.stdout
        assert done.stdout.endswith(f"submit: {name}-2 has finished\n") and done.stderr == ""
        manifest = read_manifest(cluster.storage / "out" / "small")
        assert manifest["counts"]["rows_ok"] == 18
        sent = len(server.requests)

        finished = cluster.run(*submit)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert finished.stdout.startswith(f"submit: {name}-2 has finished before")

        # Ray's own command on the same folder: looks, and asks for nothing.
        command = ["python", "-m", "jobs.collect", *arguments, "--set", "sources.0.path=in/some/rows.jsonl"]
        plain = cluster.run("ray", "job", "submit", "--address", cluster.url, "--working-dir", ".", "--", *command)
        assert plain.returncode == 0, plain.stdout + plain.stderr
        assert f"{cluster.storage}/out/small: already finished, 18 rows; 0 requests sent" in plain.stdout
        assert len(server.requests) == sent
    assert not (REPOSITORY / "out").exists()


def test_a_mistake_is_the_jobs_own_line_and_exit_code(cluster):
    submit = [sys.executable, "-m", "jobs.submit", "miniature_bench", "jobs/recipes/miniature_bench.toml"]
    wrong = cluster.run(*submit, "--address", cluster.url)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert f"error: {cluster.storage}/runs/miniature/collection" in wrong.stdout
    assert "Traceback" not in wrong.stdout and "has ended with exit code 2" in wrong.stdout.splitlines()[-1]
    # The token is asked for, and another is not taken.
    for environment, said in (({"RAY_AUTH_MODE": ""}, "asks for a token"), ({"RAY_AUTH_TOKEN": "x"}, "does not take")):
        refused = cluster.run(*submit, "--address", cluster.url, **environment)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: {cluster.url}: the cluster {said}")
        assert refused.stderr.count("\n") == 1


def test_a_cluster_that_grows_is_asked_and_not_held_to_it(monkeypatch, capsys):
    import ray
    from ray.util import placement_group_table

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    asked_before = {group for group, state in placement_group_table().items() if state["state"] != "REMOVED"}
    with pytest.raises(
        ConfigError, match=r"training needs 999 CPUs at once, this cluster has 16; ray\.wait_for_nodes_s"
    ):
        _wait_until_it_fits(RayConfig(wait_for_nodes_s=0.2), 999, 0, "training")
    assert capsys.readouterr().out == (
        "ray: waiting for nodes: training needs 999 CPUs at once, this cluster has 16; 0 s left\n"
    )
    assert {g for g, state in placement_group_table().items() if state["state"] != "REMOVED"} == asked_before
    # One that is large enough is not kept waiting, and hears nothing.
    _wait_until_it_fits(RayConfig(wait_for_nodes_s=60.0), 2, 0, "training")
    assert capsys.readouterr().out == ""
