"""A real Ray cluster of several nodes on this machine: each a `ray start` of its own, at an address of its own.

All of 127.0.0.0/8 is loopback on Linux, so the nodes differ in their address as machines do. A node is killed as a
machine dies: every process of it at once, by SIGKILL.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from janus_ray.env import set_quiet_defaults

REPOSITORY = Path(__file__).parents[2]
_START_S = 180.0
_END_S = 20.0
_POLL_S = 0.5
_SHOWN = 2000
_OBJECT_STORE_BYTES = 100_000_000


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def wait_for(what: str, condition: Callable[[], Any], limit_s: float) -> Any:
    """What the condition gives once it is true; AssertionError after the limit."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(_POLL_S)
    return found


@dataclass
class Node:
    """One node: its address, its `ray start` process, and Ray's id of it."""

    address: str
    process: subprocess.Popen[bytes]
    node_id: str = ""

    def kill(self) -> None:
        """Ends every process of the node at once, without a word to anybody."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        for process in processes:
            # Before the first of them can notice that another has gone.
            process.suspend()
        for process in processes:
            process.kill()
        self.process.wait()


class LocalCluster:
    """A head that takes no work, and workers."""

    def __init__(self, cpus_per_worker: int) -> None:
        """Makes a folder for Ray's files; nothing is started yet.

        Args:
            cpus_per_worker: logical CPUs that each worker node claims.
        """
        set_quiet_defaults()
        # Short, because the names of sockets are.
        self.folder = Path(tempfile.mkdtemp(prefix="jc"))
        self._cpus = cpus_per_worker
        self._port, self._dashboard_port = free_port("127.0.0.2"), free_port()
        self._started = 1
        self.workers: list[Node] = []
        self.head: Node | None = None
        self.trouble: Exception | None = None
        """Why the last question about the cluster had no answer."""
        # RAY_ADDRESS of this machine's own clusters is none of ours.
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(self.folder)}
        self.environment.pop("RAY_ADDRESS", None)

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"127.0.0.2:{self._port}"

    @property
    def dashboard(self) -> str:
        """URL of the dashboard, which also answers what runs where."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    def start(self, workers: int) -> None:
        """Starts head and workers, and waits until all are there."""
        head = ["--head", f"--port={self._port}", "--num-cpus=0", f"--temp-dir={self.folder}"]
        head.append(f"--ray-client-server-port={free_port('127.0.0.2')}")
        dashboard = [
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}",
        ]
        self.head = self._start([*head, *dashboard])
        wait_for("the head node", self.alive, _START_S)
        for _ in range(workers):
            self.add_worker()

    def add_worker(self, *, wait: bool = True) -> None:
        """Starts one more worker node."""
        self.workers.append(self._start([f"--address={self.address}", f"--num-cpus={self._cpus}"]))
        if wait:
            self.wait_for_workers()

    def wait_for_workers(self) -> None:
        """Waits until every worker that was started is part of the cluster."""

        def all_there() -> dict[str, str] | None:
            found = self.alive()
            for node in [node for node in self.workers if node.process.poll() is not None]:
                # Ray gives a node 30 s to start, which a busy machine may not keep.
                print(f"  the node at {node.address} did not start; another one takes its place", flush=True)
                self.workers.remove(node)
                self.add_worker(wait=False)
            return found if all(node.address in found for node in self.workers) else None

        try:
            found = wait_for("the worker nodes", all_there, _START_S)
        except AssertionError:
            for log in sorted(self.folder.glob("node-*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-_SHOWN:]}")
            raise
        for node in self.workers:
            node.node_id = found[node.address]

    def alive(self) -> dict[str, str]:
        """The nodes of the cluster: address -> id."""
        from ray.util.state import list_nodes

        try:
            nodes: list[Any] = list_nodes(self.dashboard, timeout=10)
        # While the head starts or is busy; whoever waits asks again.
        except Exception as error:
            self.trouble = error
            return {}
        return {node.node_ip: node.node_id for node in nodes if node.state == "ALIVE"}

    def actors(self, class_name: str) -> dict[str, list[int]]:
        """Process ids of the living actors whose class name holds a text, by the id of their node."""
        from ray.util.state import list_actors

        try:
            actors: list[Any] = list_actors(self.dashboard, filters=[("state", "=", "ALIVE")], limit=1000, timeout=10)
        # As in `alive`.
        except Exception as error:
            self.trouble = error
            return {}
        found: dict[str, list[int]] = {}
        for actor in actors:
            if class_name in actor.class_name and actor.node_id:
                found.setdefault(actor.node_id, []).append(actor.pid)
        return found

    def kill(self, node_id: str) -> None:
        """Kills a worker node."""
        node = next(node for node in self.workers if node.node_id == node_id)
        node.kill()
        self.workers.remove(node)

    def close(self, keep_logs: Path) -> None:
        """Ends every process of the cluster and removes its files, but for the logs of Serve, which are copied."""
        for node in [*self.workers, *([self.head] if self.head else [])]:
            if node.process.poll() is None:
                node.kill()
        for log in (self.folder / "session_latest" / "logs" / "serve").glob("*.log"):
            keep_logs.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, keep_logs)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, arguments: list[str]) -> Node:
        self._started += 1
        address = f"127.0.0.{self._started}"
        log = (self.folder / f"node-{self._started}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                    *(f"--node-ip-address={address}", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
                    # Nodes of one machine share its ports.
                    *("--min-worker-port=0", "--max-worker-port=0"),
                    *(f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"),
                    *arguments,
                ],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C at the terminal is ours to answer.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        return Node(address, process)


def _end_with_parent() -> None:
    """Called in a child before it becomes `ray start`: it dies with us, however we end (Linux: PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
