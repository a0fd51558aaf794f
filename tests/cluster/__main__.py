"""make cluster-test: the jobs on a real local cluster of three nodes, one of which dies in each stage.

    python -m tests.cluster [collect train serve evaluate] [--json FILE] [--pictures FOLDER]

A head that takes no work and two workers are started (more take the place of those that are killed), the jobs run as a
user runs them, and a table says what the death of a node cost. Exit code 0: every stage recovered and lost no row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from janus_ray.miniature.server import JUDGE, TEACHER
from tests.cluster.nodes import LocalCluster
from tests.cluster.pictures import take_pictures
from tests.cluster.stages import Outcome, Stages, answer_as_the_miniature
from tests.loopback import loopback

# One more than the server takes after it has moved to one node: a client must find room there, or all are on the other.
CPUS_PER_WORKER = 5
NAMES = ("collect", "train", "serve", "evaluate")
_COUNTS = ("requests", "requests_sent_twice", "requests_failed", "rows", "rows_lost", "steps", "steps_lost")


def main() -> int:
    """Runs the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", default=[], metavar="STAGE", help=f"of {', '.join(NAMES)}; all if none is named"
    )
    parser.add_argument("--json", type=Path, default=None, help="the numbers of each try are added to this file")
    parser.add_argument("--pictures", type=Path, default=None, help="folder for pictures of the dashboard")
    parser.add_argument(
        "--inputs", type=Path, default=None, help="folder of an earlier run, for a stage without its predecessors"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(NAMES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    # So that the cluster is taken down whatever ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="janus-cluster-"))
    if arguments.inputs:
        shutil.copytree(arguments.inputs, folder, dirs_exist_ok=True)
    began = time.monotonic()
    outcomes = run(arguments.stages or list(NAMES), folder, arguments.pictures)
    rows = [{"date": f"{datetime.now(UTC):%Y-%m-%d}", **outcome.as_row()} for outcome in outcomes]
    print_tries(rows)
    print(f"{time.monotonic() - began:.0f} s in all; files of the run: {folder}")
    if arguments.json:
        earlier = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
        arguments.json.write_text(json.dumps([*earlier, *rows], indent=2) + "\n")
        print(f"\nAll tries in {arguments.json}:")
        print_sums([*earlier, *rows])
    return 0 if all(outcome.recovered and not outcome.rows_lost for outcome in outcomes) else 1


def run(names: list[str], folder: Path, pictures: Path | None) -> list[Outcome]:
    """The outcomes of the stages, in order."""
    cluster = LocalCluster(CPUS_PER_WORKER)
    outcomes: list[Outcome] = []
    try:
        with loopback(answer_as_the_miniature, models=(TEACHER, JUDGE)) as endpoint:
            _say("starting a head and two workers")
            cluster.start(2)
            stages = Stages(cluster, folder, endpoint)
            for name in NAMES:
                if name not in names:
                    continue
                _say(name)
                cluster.wait_for_workers()
                if name == "evaluate" and stages.server is None:
                    stages.start_server()
                outcomes.append(_outcome(stages, name))
            if pictures:
                cluster.wait_for_workers()
                take_pictures(cluster.dashboard, pictures, ("cluster", "jobs"))
            stages.close()
    finally:
        cluster.close(folder / "logs")
    return outcomes


def _outcome(stages: Stages, name: str) -> Outcome:
    """The outcome of one stage; of one that could not be tried, why."""
    try:
        outcome = getattr(stages, name)()
    except AssertionError as error:
        outcome = Outcome(name, said=f"could not be tried: {error}")
    _say(f"{name}: {'recovered' if outcome.recovered else 'did not recover'} {outcome.said}")
    return outcome


def print_tries(rows: list[dict[str, Any]]) -> None:
    """What each death cost."""
    _print_table(rows, ("stage", "recovered", *_COUNTS, "seconds_lost"))
    for row in rows:
        for line in filter(None, [row["said"], *row["notes"]]):
            print(f"{row['stage']}: {line}")


def print_sums(rows: list[dict[str, Any]]) -> None:
    """The same over every try, for each stage: the figures of the README."""
    sums = []
    for name in NAMES:
        of_stage = [row for row in rows if row["stage"] == name and row["nodes"]]
        if of_stage:
            counts = {column: sum(row[column] for row in of_stage) for column in _COUNTS}
            recovered = sum(row["recovered"] for row in of_stage)
            sums.append({"stage": name, "tried": len(of_stage), "recovered": recovered, **counts})
    _print_table(sums, ("stage", "tried", "recovered", *_COUNTS))


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    heads = {column: column.replace("_", " ") for column in columns}
    print("\n" + "  ".join(f"{heads[column]:>9}" for column in columns))
    for row in rows:
        print("  ".join(f"{row[column]!s:>{max(9, len(heads[column]))}}" for column in columns))


def _say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
