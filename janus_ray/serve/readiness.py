"""Which models can answer at the moment, and when a caller who met one that cannot should come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from typing import Literal

State = Literal["starting", "ready", "restarting"]
# Where no start has been measured yet.
_UNKNOWN_START_S = 10.0


class Readiness:
    """The state of each model, as the gateway knows it."""

    def __init__(self, models: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        """Takes the model ids; each is starting. `clock` gives seconds."""
        self._clock = clock
        now_s = clock()
        self._states: dict[str, State] = dict.fromkeys(models, "starting")
        self._since_s = dict.fromkeys(self._states, now_s)
        self._start_s = dict.fromkeys(self._states, _UNKNOWN_START_S)
        self._lost: dict[str, asyncio.Event] = {model: asyncio.Event() for model in self._states}
        self.weights_ids: dict[str, str | None] = dict.fromkeys(self._states)
        self.stopping = False

    def states(self) -> dict[str, State]:
        """The state of each model."""
        return dict(self._states)

    def status(self) -> str:
        """One word for all of them: "ok" when every model can answer and new requests are taken."""
        if self.stopping:
            return "stopping"
        found = set(self._states.values())
        return next((state for state in ("restarting", "starting") if state in found), "ok")

    def mark_ready(self, model: str, weights_id: str | None = None) -> None:
        """A model has answered, or has a running replica again."""
        if self._states[model] == "ready":
            return
        self._start_s[model] = self._clock() - self._since_s[model]
        self._states[model] = "ready"
        self.weights_ids[model] = weights_id
        self._lost[model] = asyncio.Event()

    def mark_lost(self, model: str) -> None:
        """A model that was ready has no running replica any more."""
        if self._states[model] != "ready":
            return
        self._states[model], self._since_s[model] = "restarting", self._clock()
        self._lost[model].set()

    async def lost(self, model: str) -> None:
        """Returns once a model that is ready now is lost."""
        await self._lost[model].wait()

    def retry_after_s(self, model: str) -> int:
        """How much longer the start of a model takes, if it takes as long as the last one did; at least 1.

        Of a model that is ready: how long it would take.
        """
        gone_s = 0 if self._states[model] == "ready" else self._clock() - self._since_s[model]
        return max(1, math.ceil(self._start_s[model] - gone_s))
