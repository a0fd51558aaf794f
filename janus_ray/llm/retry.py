"""When to ask again: waits that grow, waits that a server asks for, and when an endpoint counts as down."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Waiting times in seconds, and the clock they run on."""

    base_s: float = 0.5
    """The first wait; each further one is twice as long."""
    cap_s: float = 30.0
    """The longest wait of our own choosing."""
    told_cap_s: float = 600.0
    """The longest wait that a server may ask for."""
    down_after: int = 8
    """An endpoint counts as down after this many failures in a row that span `give_up_after_s`; then one request tries
    again every `probe_every_s`."""
    probe_every_s: float = 5.0
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    """Seconds since 1970, for servers that name a date."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    uniform: Callable[[float, float], float] = random.uniform

    def backoff_s(self, attempts: int) -> float:
        """The wait after so many failed attempts: exponential with full jitter."""
        return self.uniform(0.0, min(self.cap_s, self.base_s * 2 ** (attempts - 1)))

    def told_s(self, headers: Mapping[str, str]) -> float | None:
        """Seconds that the server asks to wait; None where it says nothing, zero, or nonsense."""
        milliseconds = _seconds(headers.get("retry-after-ms", ""))
        told = milliseconds / 1000 if milliseconds else _seconds(headers.get("retry-after", ""))
        if told is None and (until := _date(headers.get("retry-after", ""))) is not None:
            # Both dates are the server's: its clock may be wrong.
            told = until - (_date(headers.get("date", "")) or self.now())
        return min(told, self.told_cap_s) if told and told > 0 else None


class Pacer:
    """The pause that a refused request (429) brings over all requests of its client.

    The first refusal waits as the server says. Further rounds of nothing but refusals wait longer and longer, whatever
    the server says: "Retry-After: 0" would otherwise be a loop. Requests that were on their way together are one round.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        """Starts without a pause."""
        self._policy = policy
        self._until = 0.0
        self._rounds = 0
        self._round_began = -math.inf

    async def wait(self) -> None:
        """Returns when no pause is on; one may be prolonged while we sleep through it."""
        while (pause_s := self._until - self._policy.clock()) > 0:
            await self._policy.sleep(pause_s)

    def refused(self, sent_at: float, told_s: float | None) -> float:
        """Notes a refusal of a request sent at that time, and returns the seconds that the pause lasts from now."""
        now = self._policy.clock()
        if sent_at > self._round_began:
            self._rounds += 1
            self._round_began = now
            growing_s = min(self._policy.cap_s, self._policy.base_s * 2 ** min(self._rounds - 1, 32))
            own_s = self._policy.uniform(growing_s, 1.5 * growing_s)
            wait_s = own_s if told_s is None else told_s if self._rounds == 1 else max(own_s, told_s)
            self._until = max(self._until, now + wait_s)
        elif told_s is not None:
            self._until = max(self._until, now + told_s)
        return max(0.0, self._until - now)

    def accepted(self, sent_at: float) -> None:
        """Notes a success: the next pause is shorter again."""
        if sent_at > self._round_began:
            self._rounds = max(0, self._rounds - 1)


class Breaker:
    """Whether an endpoint counts as down: it has only failed, often enough and for long enough."""

    def __init__(self, policy: RetryPolicy, give_up_after_s: float) -> None:
        """Starts with an endpoint that is up."""
        self._policy = policy
        self._give_up_after_s = give_up_after_s
        self._failing_since = 0.0
        self._failures = 0
        self._next_probe = 0.0

    def note(self, *, failed: bool) -> None:
        """Counts an attempt. An endpoint that answers, even with a refusal, is not down; one that says 5xx may be."""
        if failed and self._failures == 0:
            self._failing_since = self._policy.clock()
        self._failures = self._failures + 1 if failed else 0

    def is_down(self) -> bool:
        """Whether to fail a request unasked; one request in every few seconds is let through to find out."""
        now = self._policy.clock()
        if self._failures < self._policy.down_after or now - self._failing_since <= self._give_up_after_s:
            return False
        if now >= self._next_probe:
            self._next_probe = now + self._policy.probe_every_s
            return False
        return True


def _seconds(header: str) -> float | None:
    """A plain decimal number; None for anything else, Python's own spellings of numbers included."""
    plain = re.fullmatch(r"\d+(\.\d*)?", header.strip(), flags=re.ASCII)
    return float(plain[0]) if plain else None


def _date(header: str) -> float | None:
    """An HTTP date as seconds since 1970."""
    try:
        date = parsedate_to_datetime(header)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
