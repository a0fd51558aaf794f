"""How many CPU seconds does the demo take? User and system time over its whole process tree, step by step.

Runs `jobs/miniature.sh`, which `make demo` calls, in a folder of its own, and reads one clock that the kernel keeps for
this process and everything that descends from it (perf_event_open, task clock, inherited). Ray's daemons leave the
process tree and reap their children unseen, so that neither `time` nor getrusage counts the training workers; this
clock does. The server runs on while the demo evaluates, so its answers count for "evaluate".

Another revision is measured by its own recipes and script. Take turns, on one machine: CPU seconds rise by a tenth and
more when other programs share the cores' caches, so the ratio is the result and no single number.

Each run is added to benchmarks/results/demo_cpu.json, scores included; the table shows all of them. Needs Linux, and a
kernel that lets a user count its own time (kernel.perf_event_paranoid of 2 or less).

    python benchmarks/demo_cpu.py --fresh              # this checkout; forgets earlier runs
    python benchmarks/demo_cpu.py --revision 18ef83a   # another one, beside it
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from janus_ray.store.files import read_json, write_json
from janus_ray.store.folder import versions

REPOSITORY = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "demo_cpu.json"

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_TYPE_SOFTWARE, _TASK_CLOCK = 1, 1
# Bits of perf_event_attr: inherit, exclude_kernel, exclude_hv. The task clock counts system time all the same; a user
# may not open one without them.
_FLAGS = 1 << 1 | 1 << 5 | 1 << 6


class TreeClock:
    """CPU seconds of this process and all that it starts, also of what was orphaned or has ended."""

    def __init__(self) -> None:
        """Starts at zero.

        Raises:
            SystemExit: the kernel does not let us count.
        """
        attributes = bytearray(112)
        struct.pack_into("=IIQQQQQ", attributes, 0, _PERF_TYPE_SOFTWARE, len(attributes), _TASK_CLOCK, 0, 0, 0, _FLAGS)
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
        self._file = libc.syscall(_PERF_EVENT_OPEN[platform.machine()], buffer, 0, -1, -1, 0)
        if self._file < 0:
            reason = os.strerror(ctypes.get_errno())
            raise SystemExit(f"the kernel does not count here (perf_event_open: {reason}); try as root")

    def read_s(self) -> float:
        """Seconds since the start."""
        return struct.unpack("=Q", os.read(self._file, 8))[0] / 1e9


def measure(checkout: Path, clock: TreeClock) -> dict[str, Any]:
    """Runs one demo and returns its revision, CPU and wall seconds by step, and scores."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        paths = {"PYTHONPATH": str(checkout), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        demo = subprocess.Popen(
            ["bash", str(checkout / "jobs" / "miniature.sh")],
            cwd=folder,
            env={**os.environ, **paths, "JANUS_DEMO_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert demo.stdout
        marks = [("start", clock.read_s(), time.monotonic())]
        for line in demo.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"== ([\w-]+):", line):
                marks.append((found[1], clock.read_s(), time.monotonic()))
        if demo.wait() != 0:
            raise SystemExit(f"the demo of {checkout} failed with exit code {demo.returncode}")
        # Ray's daemons end a little after the job that started them.
        time.sleep(3)
        marks.append(("end", clock.read_s(), time.monotonic()))
        results = read_json(Path(folder) / "runs" / "miniature" / "report" / "results.json")
    pairs = list(pairwise(marks))[1:]
    return {
        "revision": _revision(checkout),
        "cpu_s": {name: round(after - before, 2) for (name, before, _), (_, after, _) in pairs},
        "wall_s": {name: round(after - before, 2) for (name, _, before), (_, _, after) in pairs},
        "total_cpu_s": round(marks[-1][1] - marks[0][1], 2),
        "date": time.strftime("%Y-%m-%d"),
        "scores": {
            split: {key: round(summary["overall"][key], 3) for key in ("mean", "low", "high")}
            for split, summary in results["models"]["janus-mini"]["own_system"]["per_split"].items()
        },
    }


def _revision(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def checked_out(revision: str) -> Generator[Path]:
    """Another revision of this repository, in a folder of its own while the block runs."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="base-") as parent:
        folder = Path(parent) / "checkout"
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    """Measures one demo and reports all that were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="a commit to measure instead of this checkout")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of before")
    arguments = parser.parse_args()
    runs = read_json(RESULT)["runs"] if RESULT.exists() and not arguments.fresh else []
    clock = TreeClock()
    if arguments.revision:
        with checked_out(arguments.revision) as folder:
            runs.append(measure(folder, clock))
    else:
        runs.append(measure(REPOSITORY, clock))
    _report(runs)


def _report(runs: list[dict[str, Any]]) -> None:
    by_revision: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_revision.setdefault(run["revision"], []).append(run)
    print(f"\n{'CPU seconds':14} " + " ".join(f"{name:>20}" for name in by_revision))
    for step in [*runs[0]["cpu_s"], "total"]:
        print(f"{step:14} " + " ".join(f"{_mean(several, step):20.1f}" for several in by_revision.values()))
    totals = {name: _mean(several, "total") for name, several in by_revision.items()}
    first, *others = totals
    for other in others:
        print(f"{first} / {other}: {totals[first] / totals[other]:.3f}")
    for name, several in by_revision.items():
        for split, score in several[-1]["scores"].items():
            print(f"{name} {split:20} {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]")
    write_json(
        RESULT,
        {
            "runs": runs,
            "total_cpu_s": totals,
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "system": platform.platform(),
            },
            "versions": versions(),
        },
    )
    print(f"-> {RESULT}")


def _mean(runs: list[dict[str, Any]], step: str) -> float:
    return statistics.mean(run["total_cpu_s"] if step == "total" else run["cpu_s"].get(step, 0.0) for run in runs)


if __name__ == "__main__":
    main()
