"""Many requests to one endpoint from several client processes: taken as they come, answered as they come.

The only file of this package that knows Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import Any

from janus_ray.errors import ConfigError, DataError
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.metrics import ASKED, ASKED_LEDGER_HITS, ASKED_RETRIES, ASKED_SENT, ASKED_TOKENS, count
from janus_ray.progress import ProgressLine

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
        self._ledger = ledger
        self._max_concurrency = max_concurrency
        self._client: ChatClient | None = None

    async def complete(self, requests: Sequence[LLMRequest]) -> Answers:
        """The outcomes of some requests, in their order, each in the ledger."""
        try:
            if self._client is None:
                self._client = ChatClient(self._target, Ledger(self._ledger), max_concurrency=self._max_concurrency)
            client = self._client
            completions = await asyncio.gather(*(client.complete(request) for request in requests))
        except (ConfigError, DataError) as error:
            return Answers(fatal=error)
        return Answers(completions, client.take_notices())

    async def close(self) -> None:
        """Closes the connections and the ledger."""
        if self._client is not None:
            await self._client.close()


def ask_all(
    requests: Iterable[LLMRequest],
    target: ReachedEndpoint,
    ledger: str | PathLike[str],
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

    total = len(requests) if total is None and isinstance(requests, Sized) else total
    parts = shares(target.max_concurrency, num_actors)
    # One logical CPU each is what the cluster check counted on.
    actor_type: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(EndpointClient)
    actors = [actor_type.remote(target.model_dump(mode="json"), fspath(ledger), part) for part in parts]
    tally = _Tally(label.partition(":")[0], ProgressLine(label, total))
    try:
        for given, answers in _answered(told_apart(requests), actors, parts):
            tally.say(answers.notices)
            if answers.fatal is not None:
                raise answers.fatal
            for request, completion in zip(given, answers.completions, strict=True):
                tally.count(completion)
                yield request, completion
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
    """Ends the actors, each after it has closed its ledger where it still can."""
    import ray

    closing = [actor.close.remote() for actor in actors]
    ray.wait(closing, num_returns=len(closing), timeout=_END_S)
    for actor in actors:
        ray.kill(actor)


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
