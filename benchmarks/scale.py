"""How do wall time and memory grow with the size of the work? Each part at two sizes, and a straight line beyond.

    python benchmarks/scale.py                  all parts
    python benchmarks/scale.py ledger collect   some of them
    python benchmarks/scale.py ledger --sizes 5000,20000

A part is a module of benchmarks/parts. Its input is made in one process and worked on in another, so that peak memory
is that of the work. "driver" is the process that a user starts, "workers" the sum over Ray's worker processes below it
at the moment when it was largest; pages that they share are divided among them (PSS). What Ray's own services take is
in neither. Prints a table and writes benchmarks/results/scale.json, where parts that did not run keep their figures.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from janus_ray.env import set_quiet_defaults
from janus_ray.job import keep_native_logs_off_the_terminal
from janus_ray.store.files import read_json, write_json
from janus_ray.store.folder import git_revision, versions

HERE = Path(__file__).parent
RESULT = HERE / "results" / "scale.json"
PARTS = sorted(path.stem for path in (HERE / "parts").glob("*.py") if not path.stem.startswith("_"))
_SAMPLE_S = 0.1
_MIB = 1024**2


def part_named(name: str) -> Any:
    """The module of a part.

    It has UNIT (what is counted), SIZES (two numbers of them), TARGET (the number to extrapolate to), `make(size,
    folder)`, which writes the input, and `measure(size, folder)`, which does the work and returns its figures by name;
    "wall_s" among them stands for the time of the whole call.
    """
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    return importlib.import_module(f"parts.{name}")


def run_one(name: str, step: str, size: int, folder: Path, figures: Path) -> None:
    """One step of a part, in this process."""
    part = part_named(name)
    if step == "make":
        part.make(size, folder)
        return
    with _Workers() as workers:
        began, cpu_began = time.monotonic(), time.process_time()
        found = part.measure(size, folder)
        wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ours = {"wall_s": wall_s, "driver_cpu_s": cpu_s, "driver_mib": driver_mib, "workers_mib": workers.peak_mib}
    write_json(figures, {**ours, **found})


class _Workers:
    """Watches how much memory Ray's worker processes below this one hold together."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Workers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            held = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    # Ray names a worker after what it runs; an idle one has nothing of ours.
                    title = process.cmdline()[0] if process.cmdline() else ""
                    if title.startswith("ray::") and "IDLE" not in title:
                        held += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak_mib = max(self.peak_mib, held / _MIB)


def measured(name: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The figures of a part at each size, each step in a process of its own."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="janus_ray-scale-") as folder:
            for step in ("make", "measure"):
                print(f"{name}, {size:,} {part_named(name).UNIT}: {step}", flush=True)
                figures = Path(folder, "figures.json")
                command = [sys.executable, __file__, name, "--step", step, "--sizes", str(size), "--folder", folder]
                subprocess.run([*command, "--figures", str(figures)], check=True)
            rows.append({"size": size, **read_json(figures)})
        print(f"{name}: {shown(rows[-1])}", flush=True)
    return rows


def extrapolated(rows: list[dict[str, Any]], target: int) -> dict[str, Any]:
    """Each figure at the target, on the straight line through the two sizes."""
    first, last = rows[0], rows[-1]
    steps = (target - first["size"]) / (last["size"] - first["size"])
    return {
        "size": target,
        **{
            name: first[name] + steps * (last[name] - first[name])
            for name, value in first.items()
            if name != "size" and isinstance(value, int | float) and isinstance(last.get(name), int | float)
        },
    }


def shown(row: dict[str, Any]) -> str:
    """Figures for the terminal."""
    figures = (f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    return ", ".join(figures)


def print_table(name: str, unit: str, rows: list[dict[str, Any]], beyond: dict[str, Any]) -> None:
    """The figures of a part: a column for each size, and one for the target."""
    print(f"\n{name} ({unit})")
    sizes = [f"{row['size']:>14,}" for row in rows] + [f"{'~' + format(beyond['size'], ','):>14}"]
    print(f"{'':24}{''.join(sizes)}")
    for figure in (key for key in rows[0] if key != "size"):
        values = [row.get(figure) for row in (*rows, beyond)]
        cells = [f"{value:>14,.1f}" if isinstance(value, int | float) else f"{value or '':>14}" for value in values]
        print(f"{figure:24}{''.join(cells)}")


def main() -> None:
    """Runs the parts and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--sizes", help="two sizes instead of the part's own, as in 1000,5000")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    sizes = tuple(int(size) for size in arguments.sizes.split(",")) if arguments.sizes else ()
    set_quiet_defaults()
    if arguments.step:
        keep_native_logs_off_the_terminal()
        return run_one(arguments.parts[0], arguments.step, sizes[0], arguments.folder, arguments.figures)
    for name in arguments.parts or PARTS:
        part = part_named(name)
        rows = measured(name, sizes or part.SIZES)
        beyond = extrapolated(rows, part.TARGET)
        # Read only now: another run may have written its parts in the meantime.
        results: dict[str, Any] = read_json(RESULT) if RESULT.is_file() else {}
        results[name] = {
            "unit": part.UNIT,
            "measured": rows,
            "extrapolated": beyond,
            "machine": {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_json(RESULT, results)
        print_table(name, part.UNIT, rows, beyond)
    print(f"-> {RESULT}")


if __name__ == "__main__":
    main()
