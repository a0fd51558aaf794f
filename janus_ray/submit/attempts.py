"""Which submission of a job this is: the same job has the same name, and each attempt at it a number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from janus_ray.config import IfExists, Recipe, named_paths, result_relevant
from janus_ray.errors import ConfigError
from janus_ray.submit.dashboard import Known, details
from janus_ray.submitted import is_output

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_MOST_ATTEMPTS = 1000


def job_name(job: str, recipe: Recipe) -> str:
    """The name of a job on the cluster: by what could change its result, and by where it writes.

    A repeat with other limits, workers or time-outs is the same job, and continues it.
    """
    outputs = {field: path for field, path in named_paths(recipe) if is_output(field)}
    content = json.dumps([job, result_relevant(recipe), outputs], sort_keys=True)
    return f"janus-{job}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


class Plan(NamedTuple):
    """What to do about a job that a cluster may know already."""

    action: Literal["submit", "follow", "finished"]
    submission_id: str
    if_exists: IfExists | None = None
    """What the job is told to do with its folder; None where it has none, or takes what is usual."""
    before: str | None = None
    """How the attempt before ended, where there was one."""


def attempts(client: JobSubmissionClient, name: str) -> list[Known]:
    """Every attempt at a job that the cluster knows, the first first."""
    found: list[Known] = []
    while len(found) < _MOST_ATTEMPTS and (known := details(client, attempt_id(name, len(found) + 1))):
        found.append(known)
    return found


def attempt_id(name: str, number: int) -> str:
    """What the cluster calls an attempt."""
    return name if number == 1 else f"{name}-{number}"


def plan(name: str, statuses: Sequence[str], if_exists: IfExists | None, *, writes_folder: bool) -> Plan:
    """Follows a job that runs, leaves a finished one alone, and tries again after any other end.

    Args:
        name: from `job_name`.
        statuses: how the attempts so far stand, the first first.
        if_exists: what the user said; None where nothing.
        writes_folder: whether the job has a folder to go on with; without one, a finished job is run again.

    Raises:
        ConfigError: the user wants to overwrite what is being written.
    """
    if not statuses:
        return Plan("submit", name, if_exists)
    latest, last = attempt_id(name, len(statuses)), statuses[-1]
    if last in ("PENDING", "RUNNING"):
        if if_exists == "overwrite":
            raise ConfigError(f"{latest} is {last.lower()} and writes there; stop it before it is overwritten")
        return Plan("follow", latest)
    if last == "SUCCEEDED" and writes_folder and if_exists is None:
        return Plan("finished", latest)
    resumes: IfExists | None = "resume" if writes_folder else None
    return Plan("submit", attempt_id(name, len(statuses) + 1), if_exists or resumes, last)
