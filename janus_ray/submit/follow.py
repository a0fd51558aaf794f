"""Following a job on a cluster: its log as it comes, through lost connections, and an exit code at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from janus_ray.errors import GenerationError
from janus_ray.progress import duration
from janus_ray.submit.dashboard import Known, details
from janus_ray.text import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOPPED, LOST = 143, 1
_POLL_S = 1.0
_ASK_S = 5.0
_LAST_LINES_S = 10.0
_READ_ATTEMPTS = 5
_SAY_S = 15.0
_PATIENCE_S = 300.0
_SHOWN_CHARACTERS = 300
_BY_RAY = {
    "JOB_SUPERVISOR_ACTOR_DIED": "the node that it ran on has gone",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "no node had the CPUs for its own process in time (--entrypoint-cpus)",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": "no node can have the CPUs for its own process (--entrypoint-cpus)",
    "RUNTIME_ENV_SETUP_FAILURE": "its files could not be set up on the cluster",
}


class Log:
    """What has been printed of a job's log; a connection that is made again starts at the log's beginning."""

    def __init__(self, show: Callable[[str], object] = lambda text: print(text, end="", flush=True)) -> None:
        """Nothing has been printed.

        Args:
            show: where pieces of the log go.
        """
        self._show = show
        self._printed = self._passed = self._in_vain = 0

    def again(self) -> None:
        """A new connection: what has been printed will come once more."""
        self._passed = 0

    def take(self, text: str) -> None:
        """Prints what is new of a piece of the log."""
        new = text[max(self._printed - self._passed, 0) :]
        self._passed += len(text)
        self._in_vain = 0
        if new:
            self._printed += len(new)
            self._show(new)

    def ended_early(self) -> None:
        """A connection ended before the job; after some that brought nothing, a person hears that there is no log."""
        self._in_vain += 1
        if self._in_vain == _READ_ATTEMPTS:
            print("submit: its log cannot be read from the node that it runs on; tried again until it ends", flush=True)


def follow(client: JobSubmissionClient, submission_id: str, patience_s: float = _PATIENCE_S) -> int:
    """Prints a job's log until it ends, and gives the exit code that says how.

    Args:
        client: from `connected`.
        submission_id: the attempt.
        patience_s: how long a dashboard that does not answer is asked again, in seconds.

    Raises:
        GenerationError: the cluster does not know the job any more, or the dashboard stayed away.
    """
    log, silent_since, waited_since = Log(), None, time.monotonic()
    said = waited_since
    while True:
        try:
            known = details(client, submission_id)
            if known is None:
                raise GenerationError(
                    f"the cluster at {client.get_address()} knows {submission_id} no more (was it started anew?); "
                    "run the same command again to continue the job"
                )
            silent_since = None
            if known.has_ended:
                # What was written since the last piece, and all of it where the job had ended before.
                asyncio.run(_tail(client, submission_id, log))
                return _ended(known)
            if known.status == "RUNNING":
                asyncio.run(_tail(client, submission_id, log))
                log.ended_early()
            elif time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                waited = duration(said - waited_since)
                print(f"submit: not started after {waited}: {one_line(known.message or '')}", flush=True)
        except ConnectionError as error:
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                left = duration(patience_s)
                print(f"submit: the dashboard does not answer ({error}); asking again for {left}", flush=True)
            if now - silent_since > patience_s:
                raise GenerationError(
                    f"no dashboard at {client.get_address()} for {duration(patience_s)}; the job may go on: the same "
                    "command follows it again"
                ) from None
        time.sleep(_POLL_S)


async def _tail(client: JobSubmissionClient, submission_id: str, log: Log) -> None:
    """Prints the log as it comes; returns when the job has ended, or when the connection has.

    Asks beside it how the job is: from a node that has gone no end of a connection comes.
    """
    log.again()
    reading = asyncio.create_task(_read(client, submission_id, log))
    try:
        while not (await asyncio.wait([reading], timeout=_ASK_S))[0]:
            known = await asyncio.to_thread(details, client, submission_id)
            if known is None or known.has_ended:
                await asyncio.wait([reading], timeout=_LAST_LINES_S)
                break
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(client: JobSubmissionClient, submission_id: str, log: Log) -> None:
    import aiohttp

    try:
        async for piece in client.tail_job_logs(submission_id):
            log.take(piece)
    # The status says what happened; RuntimeError is what Ray's client makes of a connection that was cut.
    except (aiohttp.ClientError, OSError, RuntimeError):
        return


def _ended(known: Known) -> int:
    """The exit code of a job that has ended, and a line where it is no success."""
    name = known.submission_id
    if known.status == "SUCCEEDED":
        print(f"submit: {name} has finished", flush=True)
        return 0
    if known.status == "STOPPED":
        print(f"submit: {name} was stopped; the same command continues it", flush=True)
        return STOPPED
    code = known.exit_code
    if code is None:
        reason = _BY_RAY.get(known.error_type)
        reason = reason or one_line(known.message)[:_SHOWN_CHARACTERS] or "nobody knows why"
        print(f"submit: {name} has failed: {reason}; the same command continues it", flush=True)
        return 1
    code = 128 - code if code < 0 else code
    print(f"submit: {name} has ended with exit code {code}; the same command continues it", flush=True)
    return code or 1
