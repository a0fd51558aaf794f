"""Ray actors that call an endpoint: many requests in, outcomes out, a bounded number in flight."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.progress import ProgressLine

_CHUNK = 32
# Chunks that wait at an actor while it works on others, so that its share of the limit never runs dry.
_CHUNKS_AHEAD = 2


class EndpointClient:
    """One client process: a share of an endpoint's limit, and a ledger."""

    def __init__(self, endpoint: dict[str, Any], ledger: str, max_concurrency: int) -> None:
        """Keeps what is needed: an error in an actor's constructor would not reach the job as what it is."""
        self._endpoint = ReachedEndpoint.model_validate(endpoint)
        self._ledger = ledger
        self._max_concurrency = max_concurrency
        self._client: ChatClient | None = None

    async def complete(self, requests: Sequence[LLMRequest]) -> list[Completion]:
        """The outcomes of some requests, in their order."""
        if self._client is None:
            self._client = ChatClient(self._endpoint, Ledger(self._ledger), max_concurrency=self._max_concurrency)
        client = self._client
        return list(await asyncio.gather(*(client.complete(request) for request in requests)))

    def notices(self) -> list[str]:
        """What the client would have a person know."""
        return self._client.take_notices() if self._client else []


def complete_all(
    requests: Sequence[LLMRequest], endpoint: Endpoint, ledger: Path, num_actors: int, label: str
) -> list[Completion]:
    """The outcomes of all requests, in their order; what the ledger knows is not sent again.

    Args:
        requests: what to ask.
        endpoint: whom to ask.
        ledger: folder of the ledger.
        num_actors: client processes, each with an equal share of the endpoint's limit.
        label: what the progress lines count.
    """
    import ray

    requests = told_apart(requests)
    share = math.ceil(endpoint.max_concurrency / num_actors)
    # One logical CPU each is what the cluster check counted on.
    actor_type: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(EndpointClient)
    arguments = (endpoint.model_dump(mode="json"), str(ledger.absolute()), share)
    actors = [actor_type.remote(*arguments) for _ in range(num_actors)]
    chunks = [range(start, min(start + _CHUNK, len(requests))) for start in range(0, len(requests), _CHUNK)]
    waiting = list(reversed(chunks))
    in_flight: dict[Any, tuple[range, Any]] = {}
    free = [actor for actor in actors for _ in range(_CHUNKS_AHEAD + math.ceil(share / _CHUNK))]
    outcomes: dict[int, Completion] = {}
    progress = ProgressLine(label, len(requests))
    try:
        while waiting or in_flight:
            while waiting and free:
                chunk, actor = waiting.pop(), free.pop(0)
                in_flight[actor.complete.remote([requests[index] for index in chunk])] = (chunk, actor)
            done, _ = ray.wait(list(in_flight), num_returns=1)
            for reference in done:
                chunk, actor = in_flight.pop(reference)
                outcomes.update(zip(chunk, ray.get(reference), strict=True))
                free.append(actor)
            failed = sum(outcome.status == "error" for outcome in outcomes.values())
            progress.update(len(outcomes), f"{failed} failed" if failed else "")
        for notice in sorted({line for actor in actors for line in ray.get(actor.notices.remote())}):
            print(notice, flush=True)
    finally:
        for actor in actors:
            ray.kill(actor)
    sent = sum(outcome.sent for outcome in outcomes.values())
    print(f"{label}: {len(outcomes)} done, {sent} requests sent", flush=True)
    return [outcomes[index] for index in range(len(requests))]


def told_apart(requests: Sequence[LLMRequest]) -> list[LLMRequest]:
    """The requests, equal ones numbered as samples.

    Two rubrics may be the same, and two persons may get the same answer. Each is asked for by itself; under one key in
    the ledger, a resume would give all of them the answer that one of them got.
    """
    seen: Counter[str] = Counter()
    numbered = []
    for request in requests:
        key = request.key("", "")
        numbered.append(replace(request, sample_index=request.sample_index + seen[key]))
        seen[key] += 1
    return numbered
