"""The process boundary of a job: arguments, what the terminal shows, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from janus_ray.config import AnyRecipe, IfExists, load_recipe, resolved
from janus_ray.env import log_level, native_log_path, reach_loopback_directly, set_quiet_defaults
from janus_ray.errors import JanusError


def keep_native_logs_off_the_terminal() -> None:
    """Sends what native code writes to file descriptor 2 to a log file; Python's own stderr stays on the terminal.

    Ray's C++ core reports harmless matters there, at level error and without a switch. JANUS_LOG_LEVEL=DEBUG shows
    everything.
    """
    if log_level() == "DEBUG":
        return
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = os.open(native_log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)


def _our_error(error: BaseException | None) -> JanusError | None:
    """The error for a person behind an exception: Ray wraps what crossed a process, sometimes more than once."""
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(error, JanusError) and not isinstance(inner, JanusError):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def job_arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line that every job has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.toml", help="one or more recipes, merged left to right")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a field"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe as JSON and stop")
    parser.add_argument(
        "--if-exists",
        choices=("fail", "resume", "overwrite"),
        default="fail",
        help="what to do when the output folder exists (default: fail)",
    )
    return parser


def run_job(
    recipe_type: type[AnyRecipe],
    run: Callable[[AnyRecipe, IfExists], None],
    doc: str | None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """The process boundary of a job: parse, run, and turn an error for a person into one line and exit code 2."""
    parsed = job_arguments(doc).parse_args(arguments)
    set_quiet_defaults()
    reach_loopback_directly()
    keep_native_logs_off_the_terminal()
    try:
        recipe = load_recipe(recipe_type, parsed.recipes, parsed.overrides)
        if parsed.dry_run:
            print(json.dumps(resolved(recipe), indent=2))
        else:
            run(recipe, parsed.if_exists)
    # Broad, because this is the process boundary: what is not meant for a person is raised again.
    except Exception as error:
        ours = _our_error(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run again with --if-exists resume to continue", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
