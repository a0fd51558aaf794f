"""What a person sees while a job runs: done, rate, time left."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """A length of time as a person says it: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    # Nobody needs seconds of hours.
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class ProgressLine:
    """One line of progress now and then, on standard output, each a line of its own (logs stay readable)."""

    def __init__(self, label: str, total: int | None, interval_s: float = 2.0) -> None:
        """Starts the clock.

        Args:
            label: what is counted.
            total: how many there will be, where known.
            interval_s: seconds between lines.
        """
        self._label, self._total, self._interval_s = label, total, interval_s
        self._started = self._last = time.monotonic()

    def update(self, done: int, detail: str = "", *, force: bool = False) -> None:
        """Prints when the interval has passed, or when forced."""
        now = time.monotonic()
        if not force and now - self._last < self._interval_s:
            return
        self._last = now
        share = f"/{self._total} ({100 * done / self._total:.0f} %)" if self._total else ""
        rate = done / max(now - self._started, 1e-9)
        left = f", {duration((self._total - done) / rate)} left" if self._total and 0 < done < self._total else ""
        print(f"{self._label}: {done}{share}, {rate:.0f}/s{left}{f', {detail}' if detail else ''}", flush=True)
