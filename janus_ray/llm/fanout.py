"""Many requests to one endpoint from several client processes: taken as they come, answered as they come.

The only file of this package that knows Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from upath import UPath

from janus_ray.errors import ConfigError, DataError
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.ledger import Ledger, index_ledger
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.metrics import ASKED, ASKED_LEDGER_HITS, ASKED_RETRIES, ASKED_SENT, ASKED_TOKENS, count
from janus_ray.progress import ProgressLine
from janus_ray.store.location import is_local, location
from janus_ray.store.log import flushed_at_the_end

# Requests in one call of an actor: its answers come back together, so few, and a call costs about a millisecond.
_CHUNK = 8
# Requests that lie at an actor for each that it may have in flight, so that its share of the limit never runs dry.
_AHEAD = 4
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What an actor hands back for one call."""

    completions: Sequence[Completion] = ()
    notices: Sequence[str] = ()
    fatal: ConfigError | DataError | None = None
    """What ends the job. Not raised in the actor, where Ray would wrap it up in its traceback."""


class EndpointClient:
    """One client process: a share of an endpoint's limit, and a ledger."""

    def __init__(self, target: dict[str, Any], ledger: str, max_concurrency: int) -> None:
        """Keeps what is needed: an error in an actor's constructor would not reach the job as what it is."""
        self._target = ReachedEndpoint.model_validate(target)
        self._folder = ledger
        self._max_concurrency = max_concurrency
        self._client: ChatClient | None = None
        self._ledger: Ledger | None = None

    async def complete(self, requests: Sequence[LLMRequest]) -> Answers:
        """The outcomes of some requests, in their order, each in the ledger."""
        try:
            if self._client is None:
                self._ledger = Ledger(self._folder)
                self._client = ChatClient(self._target, self._ledger, max_concurrency=self._max_concurrency)
            client = self._client
            completions = await asyncio.gather(*(client.complete(request) for request in requests))
        except (ConfigError, DataError) as error:
            return Answers(fatal=error)
        return Answers(completions, client.take_notices())

    async def flush(self) -> None:
        """Returns when every answer is where another process can read it.

        Raises:
            DataError: one cannot be written.
        """
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.flush)

    async def close(self) -> Answers:
        """Closes the ledger and the connections."""
        if self._client is not None and self._ledger is not None:
            await self._client.close()
            try:
                await asyncio.to_thread(self._ledger.close)
            except DataError as error:
                return Answers(fatal=error)
        return Answers()


def ask_all(
    requests: Iterable[LLMRequest],
    target: ReachedEndpoint,
    ledger: Path | UPath | str,
    num_actors: int,
    label: str,
    *,
    total: int | None = None,
) -> Iterator[tuple[LLMRequest, Completion]]:
    """Asks an endpoint and yields each request, as it was given, with its outcome, in the order of the answers.

    Requests are taken from the iterable a bounded number ahead: four for each that may be in flight. An answer is in
    the ledger before it is yielded, and what the ledger knows is not sent again. Equal requests are told apart (see
    `told_apart`); give them a `custom_id` to tell whose answer is whose. A failed request is an outcome like any other.

    Args:
        requests: what to ask.
        target: whom to ask.
        ledger: folder of the ledger.
        num_actors: client processes; the endpoint's limit is divided among them.
        label: the stage and what its progress lines count, as in "evaluate: judgments".
        total: how many requests there will be, for the time left; a list or another sized collection tells itself.

    Raises:
        ConfigError, DataError: the ledger cannot be read or written, or a client process has not what it needs (the
            key's variable). What was answered before is in the ledger.
    """
    import ray

    # Once, here: every actor would look through the whole ledger.
    index_ledger(ledger)
    total = len(requests) if total is None and isinstance(requests, Sized) else total
    parts = shares(target.max_concurrency, num_actors)
    # One logical CPU each is what the cluster check counted on.
    actor_type: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(EndpointClient)
    folder = absolute(ledger)
    actors = [actor_type.remote(target.model_dump(mode="json"), folder, part) for part in parts]
    tally = _Tally(label.partition(":")[0], ProgressLine(label, total))
    try:
        # A signal or a full disk in another place must not cost what an actor holds back for an object storage.
        with flushed_at_the_end(lambda: _call_all(actors, "flush")):
            for given, answers in _answered(told_apart(requests), actors, parts):
                tally.say(answers.notices)
                if answers.fatal is not None:
                    raise answers.fatal
                for request, completion in zip(given, answers.completions, strict=True):
                    tally.count(completion)
                    yield request, completion
        for answers in ray.get([actor.close.remote() for actor in actors]):
            if answers.fatal is not None:
                raise answers.fatal
    finally:
        _end(actors)
    print(f"{label}: {tally.done} done, {tally.sent} requests sent", flush=True)


def _answered(
    waiting: Iterator[tuple[LLMRequest, LLMRequest]], actors: Sequence[Any], parts: Sequence[int]
) -> Iterator[tuple[list[LLMRequest], Answers]]:
    """Keeps every actor supplied and yields requests, as they were given, with what an actor says to them."""
    import ray

    load = [0] * len(actors)
    busy: dict[Any, tuple[int, list[LLMRequest]]] = {}
    while True:
        for actor, pairs in _supply(waiting, load, parts):
            reference = actors[actor].complete.remote([numbered for _, numbered in pairs])
            busy[reference] = actor, [given for given, _ in pairs]
        if not busy:
            return
        done, _ = ray.wait(list(busy), num_returns=1)
        for reference in done:
            actor, given = busy.pop(reference)
            load[actor] -= len(given)
            yield given, ray.get(reference)


def _supply(
    waiting: Iterator[tuple[LLMRequest, LLMRequest]], load: list[int], parts: Sequence[int]
) -> Iterator[tuple[int, list[tuple[LLMRequest, LLMRequest]]]]:
    """Takes requests while an actor has room, each for the one with the least to do, and yields them as calls.

    One by one, so that a few requests are spread over all actors.
    """
    taken: list[list[tuple[LLMRequest, LLMRequest]]] = [[] for _ in parts]
    while True:
        actor = min(range(len(parts)), key=lambda index: load[index] / parts[index])
        if load[actor] >= _AHEAD * parts[actor] or (pair := next(waiting, None)) is None:
            break
        taken[actor].append(pair)
        load[actor] += 1
    for actor, pairs in enumerate(taken):
        for start in range(0, len(pairs), _CHUNK):
            yield actor, pairs[start : start + _CHUNK]


def _end(actors: Sequence[Any]) -> None:
    """Ends the actors, each after it has closed its ledger where it can and had not done so."""
    import ray

    _call_all(actors, "close")
    for actor in actors:
        ray.kill(actor)


def _call_all(actors: Sequence[Any], method: str) -> None:
    """Calls a method of every actor and waits a while; what one of them raises is not what ends the job."""
    import ray

    calls = [getattr(actor, method).remote() for actor in actors]
    ray.wait(calls, num_returns=len(calls), timeout=_END_S)


@dataclass(slots=True)
class _Tally:
    """What the terminal and the metrics are told."""

    stage: str
    progress: ProgressLine
    done: int = 0
    failed: int = 0
    sent: int = 0
    said: set[str] = field(default_factory=set)

    def count(self, completion: Completion) -> None:
        self.done += 1
        self.failed += completion.status == "error"
        self.sent += completion.sent
        self.progress.update(self.done, failed=self.failed)
        _count(self.stage, completion)

    def say(self, notices: Iterable[str]) -> None:
        """Prints what is new: each client process finds the same out for itself."""
        for notice in notices:
            if notice not in self.said:
                print(notice, flush=True)
                self.said.add(notice)


def _count(stage: str, completion: Completion) -> None:
    """Counts an outcome; what the ledger knew was sent and paid for by an earlier run."""
    count(ASKED, stage=stage, status=completion.error_kind or "ok")
    if not completion.sent:
        count(ASKED_LEDGER_HITS, stage=stage)
        return
    count(ASKED_SENT, completion.sent, stage=stage)
    count(ASKED_RETRIES, completion.sent - 1, stage=stage)
    count(ASKED_TOKENS, completion.usage.prompt_tokens, stage=stage, kind="prompt")
    count(ASKED_TOKENS, completion.usage.completion_tokens, stage=stage, kind="completion")


def absolute(folder: Path | UPath | str) -> str:
    """A location as another process finds it, whatever folder it runs in."""
    where = location(folder)
    return str(where.absolute()) if is_local(where) else str(where)


def shares(max_concurrency: int, num_actors: int) -> list[int]:
    """An endpoint's limit divided among client processes: all of it, as evenly as it goes, and nobody gets nothing."""
    each, more = divmod(max_concurrency, min(num_actors, max_concurrency))
    return [each + (index < more) for index in range(min(num_actors, max_concurrency))]


def told_apart(requests: Iterable[LLMRequest]) -> Iterator[tuple[LLMRequest, LLMRequest]]:
    """Each request as it was given and as it is asked: equal ones are numbered as samples, in their order.

    Two rubrics may be the same, and two persons may get the same answer. Each is asked for by itself; under one key in
    the ledger, a resume would give all of them the answer that one of them got.
    """
    # 64 bits of the key: were two to meet there, one would be numbered without need.
    seen: set[int] = set()
    more: dict[int, int] = {}
    for request in requests:
        key = int(request.key("", "")[:16], 16)
        if key not in seen:
            seen.add(key)
            yield request, request
            continue
        more[key] = more.get(key, 0) + 1
        yield request, replace(request, sample_index=request.sample_index + more[key])
