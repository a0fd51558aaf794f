"""The process boundary of a job: arguments, what the terminal shows, signals, exit codes."""

from __future__ import annotations

import argparse
import errno
import glob
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from janus_ray.config import AnyRecipe, IfExists, load_recipe, resolved
from janus_ray.env import log_level, native_log_path, reach_loopback_directly, set_quiet_defaults, submitted_job
from janus_ray.errors import ClusterError, JanusError
from janus_ray.provider import providers_running
from janus_ray.store.location import said_by_a_storage
from janus_ray.store.log import flush_all
from janus_ray.submitted import on_storage
from janus_ray.text import one_line

_NATIVE_LOGS_KEPT_S = 24 * 3600.0
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# What the system says of a path that a person named, or of the disk it leads to.
_ABOUT_A_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE)
# By name, because looking at them must not import Ray: what happened to a machine, not to our code.
_MACHINE_ERRORS = {
    "OutOfMemoryError": "a Ray worker was ended because the machine ran out of memory",
    "ObjectStoreFullError": "Ray's object store is full: raise ray.object_store_gib",
    "OutOfDiskError": "Ray's temporary folder is full: make room there, or set RAY_TMPDIR to another",
    "LocalRayletDiedError": "Ray's own process on this machine has ended",
    "NodeDiedError": "a machine of the Ray cluster has gone",
}


def keep_native_logs_off_the_terminal() -> None:
    """Sends what native code writes to file descriptor 2 to a log file; Python's own stderr stays on the terminal.

    Ray's C++ core reports harmless matters there, at level error and without a switch. JANUS_LOG_LEVEL=DEBUG shows
    everything.
    """
    # Names of files may hold bytes that no encoding knows; a message about them is no place to fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if log_level() == "DEBUG":
        return
    _remove_old_native_logs()
    try:
        log = os.open(native_log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:
        # A full or foreign temporary folder is no reason not to work.
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(log, 2)
    os.close(log)


def _remove_old_native_logs() -> None:
    for path in glob.glob(native_log_path("*")):
        with suppress(OSError):
            if time.time() - os.stat(path).st_mtime > _NATIVE_LOGS_KEPT_S:
                os.unlink(path)


def _for_a_person(error: BaseException | None) -> str | None:
    """What a person can act on behind an exception: Ray wraps what crossed a process, sometimes more than once."""
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(error, JanusError) and not isinstance(inner, JanusError):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{os.strerror(error.errno)}; make room, then run again with --if-exists resume"
        if isinstance(error, OSError) and error.filename and error.errno in _ABOUT_A_PATH:
            return f"{one_line(os.fsdecode(error.filename))}: {os.strerror(error.errno)}"
        if said := said_by_a_storage(error):
            return f"a storage cannot be read or written: {said}; run again with --if-exists resume to continue"
        if (known := _MACHINE_ERRORS.get(type(error).__name__)) and type(error).__module__.startswith("ray."):
            return f"{known}; run again with --if-exists resume to continue"
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def end_on_signals(advice: str) -> None:
    """From here on SIGINT and SIGTERM say one line and end the process, with the exit code that shells expect.

    At once, without taking anything down first: whatever a job writes is whole or absent, so that a resume goes on from
    a power cut as well (only what logs on an object storage hold back is written before); Ray's processes end with
    ours; and where the whole process group was signalled, as `timeout` does, they are gone already, and Ray's native
    threads answer that by SIGABRT in the middle of an orderly end.

    Args:
        advice: what the line says after the signal's name.
    """

    def end(number: int, _: FrameType | None) -> NoReturn:
        # A second signal must not take the line's place, and must end what hangs after it.
        for each in _SIGNALS:
            signal.signal(each, lambda *_: None)
        # Not print: the signal may have come in the middle of one.
        line = f"{_SIGNALS[signal.Signals(number)]}{advice}\n"
        with suppress(OSError):
            os.write(sys.stderr.fileno(), line.encode())
        for each in _SIGNALS:
            signal.signal(each, lambda *_: os._exit(128 + number))
        flush_all()
        with suppress(OSError, RuntimeError):
            sys.stdout.flush()
        os._exit(128 + number)

    for each in _SIGNALS:
        # A shell without job control starts background jobs with SIGINT ignored, and means it.
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, end)


class Arguments(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as a recipe's are."""

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        self.exit(2, f"error: {' '.join(message.split())} (--help lists what is taken)\n")


def job_arguments(doc: str | None, *, writes_folder: bool = True) -> argparse.ArgumentParser:
    """The command line that every job has; `--if-exists` where it has an output folder to go on with."""
    parser = Arguments(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    take_recipes(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe as JSON and stop")
    if writes_folder:
        take_if_exists(parser, "fail; resume in a job submitted to a cluster")
    return parser


def take_recipes(parser: argparse.ArgumentParser) -> None:
    """Recipes, and what overrides them."""
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.toml", help="one or more recipes, merged left to right")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a field"
    )


def take_if_exists(parser: argparse.ArgumentParser, default: str) -> None:
    """What to do about an output folder that is there."""
    parser.add_argument(
        "--if-exists",
        choices=("fail", "resume", "overwrite"),
        help=f"what to do when the output folder exists (default: {default})",
    )


def run_job(
    recipe_type: type[AnyRecipe],
    run: Callable[[AnyRecipe, IfExists], None],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    *,
    load: Callable[[type[AnyRecipe], Sequence[str], Sequence[str]], AnyRecipe] = load_recipe,
    writes_folder: bool = True,
) -> NoReturn:
    """The process boundary of a job: parse, run, and turn an error for a person into one line and exit code 2.

    Args:
        recipe_type: what the recipes must be.
        run: the job; it is given the recipe and what to do when its output folder exists.
        doc: the job's help.
        arguments: the command line; None takes the process's.
        load: reads the recipe from the command line's files and overrides.
        writes_folder: whether there is an output folder; without one `--if-exists` is no argument of the job.
    """
    parsed = job_arguments(doc, writes_folder=writes_folder).parse_args(arguments)
    submitted = submitted_job() is not None
    set_quiet_defaults()
    reach_loopback_directly()
    keep_native_logs_off_the_terminal()
    end_on_signals("; run again with --if-exists resume to continue" if writes_folder else "")

    def act() -> int:
        recipe = load(recipe_type, parsed.recipes, parsed.overrides)
        if submitted:
            recipe = on_storage(recipe)
        if parsed.dry_run:
            print(json.dumps(resolved(recipe), indent=2))
        else:
            # A cluster's job is run again as a matter of course, by whoever submitted it or by the cluster.
            if_exists = getattr(parsed, "if_exists", None) or ("resume" if submitted else "fail")
            with providers_running(recipe):
                run(recipe, if_exists)
        return 0

    unread = "nobody reads standard output any more; run again with --if-exists resume to continue"
    end_with(act, "" if parsed.dry_run else unread)


def end_with(act: Callable[[], int], unread: str) -> NoReturn:
    """Acts, and ends the process with the exit code that comes of it; an error for a person is one line and code 2.

    Args:
        act: gives the exit code.
        unread: what is said where nobody reads standard output any more; empty for nothing.
    """
    try:
        code = act()
        sys.stdout.flush()
    # Broad, because this is the process boundary: what is not meant for a person is raised again.
    except Exception as error:
        if isinstance(error, OSError) and not _stdout_works():
            if unread:
                print(f"error: {unread}", file=sys.stderr)
            # Not sys.exit, which would try once more to write what nobody reads.
            os._exit(128 + signal.SIGPIPE)
        if (said := _for_a_person(error)) is None:
            raise
        print(f"error: {' '.join(said.splitlines())}", file=sys.stderr, flush=True)
        if isinstance(error, ClusterError):
            # Not sys.exit, at which Ray would wait for what has gone.
            flush_all()
            os._exit(2)
        sys.exit(2)
    sys.exit(code)


def _stdout_works() -> bool:
    """Whether somebody still reads standard output."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return not any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))
