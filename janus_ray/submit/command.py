"""`python -m jobs.submit`: checks a job here, sends it to a cluster, and stays with it until it ends."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from janus_ray.cluster import ENTRYPOINT_CPUS
from janus_ray.config import Recipe
from janus_ray.env import reach_loopback_directly, set_quiet_defaults, storage_root
from janus_ray.errors import ConfigError, GenerationError
from janus_ray.job import Arguments, end_on_signals, end_with, take_if_exists, take_recipes
from janus_ray.submit.attempts import Plan, attempts, job_name, plan
from janus_ray.submit.dashboard import connected
from janus_ray.submit.follow import follow
from janus_ray.submit.package import files_to_send, packed
from janus_ray.submitted import on_storage
from janus_ray.text import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LIMIT_MIB = 64.0
_SENT_RECIPES = "submitted_recipes"


Load = Callable[[Sequence[str], Sequence[str]], Recipe]


def submit(loads: dict[str, Load], writes_folder: Iterable[str], doc: str | None) -> NoReturn:
    """The process boundary of the submitter.

    Args:
        loads: the jobs by name, and what reads their recipes and overrides.
        writes_folder: the jobs that have an output folder to go on with.
        doc: the help.
    """
    parsed = submit_arguments(list(loads), doc).parse_args()
    set_quiet_defaults(own_cluster=False)
    reach_loopback_directly()
    end_on_signals("; run the same command again")
    end_with(lambda: _act(parsed, loads[parsed.job], parsed.job in set(writes_folder)), "")


def submit_arguments(jobs: list[str], doc: str | None) -> argparse.ArgumentParser:
    """The submitter's command line."""
    parser = Arguments(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=jobs, help="the job to run")
    take_recipes(parser)
    take_if_exists(parser, "a finished job is left alone, a running one followed, any other resumed")
    parser.add_argument(
        "--address", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or this machine's)"
    )
    parser.add_argument(
        "--storage", help="where relative paths lie on the cluster (default: JANUS_STORAGE, here or there)"
    )
    parser.add_argument(
        "--working-dir", default=".", type=Path, help="what is sent along (default: the current folder)"
    )
    parser.add_argument(
        "--upload-limit-mib", type=_amount, default=_LIMIT_MIB, help=f"most to send (default: {_LIMIT_MIB:g})"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="a variable of this shell that the job gets too"
    )
    parser.add_argument(
        "--entrypoint-cpus",
        type=_amount,
        default=1.0,
        help="CPUs of the cluster for the job's own process (default: 1); 0 runs it on the head",
    )
    parser.add_argument("--no-follow", action="store_true", help="return as soon as the job is submitted")
    return parser


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0")
    return value


def _act(parsed: argparse.Namespace, load: Load, writes_folder: bool) -> int:
    if parsed.if_exists and not writes_folder:
        raise ConfigError(f"--if-exists: {parsed.job} has no output folder that it could go on with")
    if parsed.storage is not None:
        os.environ["JANUS_STORAGE"] = parsed.storage
    recipe = load(parsed.recipes, parsed.overrides)
    names = files_to_send(_folder(parsed.working_dir))
    if storage_root():
        recipe = on_storage(recipe, _sent(names))
    arguments, more = _recipes_as_sent(parsed.recipes, parsed.working_dir, set(names))
    variables = _variables(parsed.env)
    content = packed(parsed.working_dir, names, more, parsed.upload_limit_mib)
    client = connected(parsed.address)
    statuses = [known.status for known in attempts(client, job_name(parsed.job, recipe))]
    todo = plan(job_name(parsed.job, recipe), statuses, parsed.if_exists, writes_folder=writes_folder)
    if todo.action == "finished":
        print(
            f"submit: {todo.submission_id} has finished before; --if-exists resume looks again, overwrite starts over"
        )
        return 0
    if todo.action == "submit":
        for override in parsed.overrides:
            arguments += ["--set", override]
        arguments += ["--if-exists", todo.if_exists] if todo.if_exists else []
        command = shlex.join(["python", "-m", f"jobs.{parsed.job}", *arguments])
        _send(client, todo, command, content, variables, parsed.entrypoint_cpus)
    _say(client, todo, len(content))
    if parsed.no_follow:
        return 0
    _leave_on_signals(client, todo.submission_id)
    return follow(client, todo.submission_id)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"--working-dir {path}: no such folder")
    return path


def _sent(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a relative path of a recipe is a file that is sent, or a folder with one."""
    there = set(names) | {"/".join(name.split("/")[:end]) for name in names for end in range(1, name.count("/") + 1)}
    return lambda path: os.path.normpath(path) in there


def _recipes_as_sent(recipes: Sequence[str], folder: Path, sent: set[str]) -> tuple[list[str], dict[str, bytes]]:
    """The recipes as the job finds them; one that lies elsewhere, or is not sent by itself, is sent along."""
    names: list[str] = []
    more: dict[str, bytes] = {}
    for index, recipe in enumerate(recipes):
        name = os.path.relpath(os.path.realpath(recipe), os.path.realpath(folder))
        if name not in sent:
            name = f"{_SENT_RECIPES}/{index}-{Path(recipe).name}"
            more[name] = Path(recipe).read_bytes()
        names.append(name)
    return names, more


def _variables(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: is not set in this shell")
    root = storage_root()
    return {name: os.environ[name] for name in names} | ({"JANUS_STORAGE": root} if root else {})


def _send(
    client: JobSubmissionClient, todo: Plan, command: str, content: bytes, variables: dict[str, str], cpus: float
) -> None:
    import requests

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "working_dir.zip")
        package.write_bytes(content)
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=todo.submission_id,
                runtime_env={"working_dir": str(package), "env_vars": variables},
                metadata={ENTRYPOINT_CPUS: f"{cpus:g}"},
                entrypoint_num_cpus=cpus or None,
            )
        except (requests.RequestException, RuntimeError) as error:
            # Somebody submitted the same job at the same time: it is followed.
            if "already exists" not in str(error):
                raise GenerationError(f"{client.get_address()}: {one_line(str(error))}") from None


def _say(client: JobSubmissionClient, todo: Plan, size: int) -> None:
    where, name = client.get_address(), todo.submission_id
    if todo.action == "follow":
        print(f"submit: {name} runs at {where}, with the settings it was started with")
    else:
        before = f"; the attempt before: {todo.before.lower()}" if todo.before else ""
        print(f"submit: {name} at {where}, {size / 1024**2:.1f} MiB sent{before}")
    print(f"submit: the same command follows it again; ray job stop --address {where} {name} stops it", flush=True)


def _leave_on_signals(client: JobSubmissionClient, submission_id: str) -> None:
    """From here on a signal ends the following, and says that the job does not end with it."""
    where = client.get_address()

    def leave(number: int, _: FrameType | None) -> NoReturn:
        line = (
            f"\nsubmit: {submission_id} goes on; the same command follows it again, "
            f"ray job stop --address {where} {submission_id} stops it\n"
        )
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
