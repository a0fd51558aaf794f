"""Many requests to one endpoint from several client processes: taken as they come, answered as they come.

The only file of this package that knows Ray.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from upath import UPath

from janus_ray.errors import ConfigError, DataError
from janus_ray.llm.asked import Counts, report
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.ledger import Ledger, index_ledger
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.progress import ProgressLine
from janus_ray.store.location import is_local, location
from janus_ray.store.log import flushed_at_the_end

Item = TypeVar("Item")

# Items in one call of an actor: what came of them comes back together, so few, and a call costs about a millisecond.
_CHUNK = 8
# Items that lie at an actor for each request that it may have in flight, so that its share of the limit never runs dry.
_AHEAD = 4
# After so long without any answer the actors are asked whether they are there, and given so long to say so.
_PATIENCE_S, _PING_S = 120.0, 60.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What a client process hands back for one call."""

    results: Any = ()
    """What `ClientProcess.results` returned."""
    notices: Sequence[str] = ()
    counts: Counts = field(default_factory=Counter)
    """What was asked for them."""
    fatal: ConfigError | DataError | None = None
    """What ends the job. Not raised in the actor, where Ray would wrap it up in its traceback."""


class ClientProcess(ABC, Generic[Item]):
    """One client process: a share of an endpoint's limit, and a ledger."""

    def __init__(self, target: dict[str, Any], ledger: str, max_concurrency: int) -> None:
        """Keeps what is needed: an error in an actor's constructor would not reach the job as what it is."""
        self._target = ReachedEndpoint.model_validate(target)
        self._folder = ledger
        self._max_concurrency = max_concurrency
        self._client: ChatClient | None = None
        self._ledger: Ledger | None = None

    @abstractmethod
    async def results(self, client: ChatClient, items: Sequence[Item]) -> Any:
        """What comes of some items, each answer in the ledger; something that can be sent to another process."""

    async def answer(self, items: Sequence[Item]) -> Answers:
        """Does the work for some items."""
        try:
            if self._client is None:
                self._ledger = Ledger(self._folder)
                self._client = ChatClient(self._target, self._ledger, max_concurrency=self._max_concurrency)
            return Answers(
                await self.results(self._client, items), self._client.take_notices(), self._client.take_counts()
            )
        except (ConfigError, DataError) as error:
            return Answers(fatal=error)

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


class EndpointClient(ClientProcess[LLMRequest]):
    """A client process that asks and does nothing else."""

    async def results(self, client: ChatClient, items: Sequence[LLMRequest]) -> list[Completion]:
        """The outcomes of some requests, in their order."""
        return list(await asyncio.gather(*(client.complete(request) for request in items)))


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
    total = len(requests) if total is None and isinstance(requests, Sized) else total
    tally = _Tally(ProgressLine(label, total))
    numbered = told_apart(requests)
    for some, outcomes in fan_out(numbered, EndpointClient, (), target, ledger, num_actors, sent=_numbered):
        for (request, _), completion in zip(some, outcomes, strict=True):
            tally.count(completion)
            yield request, completion
    print(f"{label}: {tally.done} done, {tally.sent} requests sent", flush=True)


def fan_out(
    items: Iterable[Item],
    process: type[ClientProcess[Any]],
    arguments: Sequence[Any],
    target: ReachedEndpoint,
    ledger: Path | UPath | str,
    num_actors: int,
    *,
    sent: Callable[[Item], Any] = lambda item: item,
) -> Iterator[tuple[list[Item], Any]]:
    """Spreads items over client processes and yields some of them with what came of them, in the order of the answers.

    Every process has its part of the endpoint's limit and gets items one by one, the one with the least to do first, so
    that the whole limit is used with any number of processes, also for a few items. Notices are printed, each once.

    Args:
        items: what there is to do; taken a bounded number ahead.
        process: what each actor is.
        arguments: what its constructor takes after target, ledger and limit.
        target: whom to ask.
        ledger: folder of the ledger.
        num_actors: number of processes; no more are started than requests are allowed at once.
        sent: what of an item is sent to a process.

    Raises:
        ConfigError, DataError: as `ask_all`.
    """
    import ray

    waiting = iter(items)
    if (first := next(waiting, None)) is None:
        return
    # Once, here: every actor would look through the whole ledger.
    index_ledger(ledger)
    parts = shares(target.max_concurrency, num_actors)
    # One logical CPU each is what the cluster check counted on; on several nodes, so that one that dies is not all.
    options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    actor_type: Any = ray.remote(num_cpus=1, **options)(process)
    folder = _absolute(ledger)
    actors = [actor_type.remote(target.model_dump(mode="json"), folder, part, *arguments) for part in parts]
    said: set[str] = set()
    try:
        # A signal must not cost what an actor holds back for an object storage.
        with flushed_at_the_end(lambda: _call_all(actors, "flush")):
            for given, answers in _answered(chain((first,), waiting), actors, parts, sent):
                # Each client process finds the same out for itself.
                for notice in dict.fromkeys(answers.notices):
                    if notice not in said:
                        print(notice, flush=True)
                        said.add(notice)
                report(answers.counts)
                if answers.fatal is not None:
                    raise answers.fatal
                yield given, answers.results
        _close(actors)
    finally:
        _end(actors)


def _close(actors: Sequence[Any]) -> None:
    """Has the actors write what they hold back, and raises what one of them cannot write."""
    import ray
    from ray.exceptions import RayActorError

    for closing in [actor.close.remote() for actor in actors]:
        # One that was given up is gone; what it was asked the others have answered.
        with suppress(RayActorError):
            if (fatal := ray.get(closing).fatal) is not None:
                raise fatal


def _numbered(pair: tuple[LLMRequest, LLMRequest]) -> LLMRequest:
    return pair[1]


def _answered(
    waiting: Iterator[Item], actors: Sequence[Any], parts: Sequence[int], sent: Callable[[Item], Any]
) -> Iterator[tuple[list[Item], Answers]]:
    """Keeps every actor supplied and yields items with what an actor says to them."""
    import ray

    load: list[float] = [0] * len(actors)
    busy: dict[Any, tuple[int, list[Item]]] = {}
    while True:
        for actor, items in _supply(waiting, load, parts):
            busy[actors[actor].answer.remote([sent(item) for item in items])] = actor, items
        if not busy:
            return
        done, _ = ray.wait(list(busy), num_returns=1, timeout=_PATIENCE_S)
        for reference in done:
            actor, items = busy.pop(reference)
            load[actor] -= len(items)
            yield items, ray.get(reference)
        if not done:
            waiting = chain(_taken_back(actors, load, busy), waiting)


def _taken_back(actors: Sequence[Any], load: list[float], busy: dict[Any, tuple[int, list[Item]]]) -> list[Item]:
    """Finds actors that do not answer, as when their node is gone and no other has room, and returns their items.

    Such an actor is ended and gets nothing more, as long as another answers; otherwise there is nothing but to wait.
    """
    import ray

    alive = [index for index, held in enumerate(load) if held < math.inf]
    calls = {actors[index].answer.remote([]): index for index in alive}
    answered, silent = ray.wait(list(calls), num_returns=len(calls), timeout=_PING_S)
    if not silent:
        # The endpoint is slow, or has asked us to wait.
        return []
    if not answered:
        print(f"none of {len(actors)} client processes answers; each needs one CPU of the cluster", flush=True)
        return []
    lost = {calls[reference] for reference in silent}
    print(
        f"{len(lost)} of {len(actors)} client processes do not answer (a node that is gone, or no CPU for them); "
        "the others go on with their requests",
        flush=True,
    )
    for index in lost:
        load[index] = math.inf
        ray.kill(actors[index])
    taken = [reference for reference, (index, _) in busy.items() if index in lost]
    return [item for reference in taken for item in busy.pop(reference)[1]]


def _supply(waiting: Iterator[Item], load: list[float], parts: Sequence[int]) -> Iterator[tuple[int, list[Item]]]:
    """Takes items while an actor has room, each for the one with the least to do, and yields them as calls.

    One by one, so that a few items are spread over all actors.
    """
    taken: list[list[Item]] = [[] for _ in parts]
    while True:
        actor = min(range(len(parts)), key=lambda index: load[index] / parts[index])
        if load[actor] >= _AHEAD * parts[actor] or (item := next(waiting, None)) is None:
            break
        taken[actor].append(item)
        load[actor] += 1
    for actor, items in enumerate(taken):
        for start in range(0, len(items), _CHUNK):
            yield actor, items[start : start + _CHUNK]


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
    """What the terminal is told."""

    progress: ProgressLine
    done: int = 0
    failed: int = 0
    sent: int = 0

    def count(self, completion: Completion) -> None:
        self.done += 1
        self.failed += completion.status == "error"
        self.sent += completion.sent
        self.progress.update(self.done, failed=self.failed)


def _absolute(folder: Path | UPath | str) -> str:
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
