"""What a person sees while a job runs, and what a dashboard sees of it: done, rate, time left."""

from __future__ import annotations

import time
from collections import deque

from janus_ray.metrics import PROGRESS_DONE, PROGRESS_FAILED, PROGRESS_TOTAL, show

# The pace is that of the last minute: what a ledger knew at the start of a resume is no measure of what is to come.
_WINDOW_S = 60.0
_INTERVAL_S = 2.0
_LONGEST_INTERVAL_S = 60.0


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
    """Lines of progress on standard output, each a line of its own (logs stay readable), and the same as metrics.

    In the first two minutes a line every two seconds at most, later ever fewer, down to one a minute.
    """

    def __init__(self, label: str, total: int | None = None, *, done: int = 0) -> None:
        """Starts the clock.

        Args:
            label: the stage and what is counted, as in "collect: rows".
            total: how many there will be, where known.
            done: how many of them were done before the clock started.
        """
        self._label, self._total = label, total
        self._began = self._printed = time.monotonic()
        # Times and counts within the window; the first may be older.
        self._seen = deque([(self._began, done)])

    def update(self, done: int, detail: str = "", *, failed: int = 0, force: bool = False) -> None:
        """Reports the state; prints it when the interval has passed, or when forced.

        Args:
            done: how many are done, those that failed among them.
            detail: what else is worth a word.
            failed: how many of those done have failed.
            force: print now.
        """
        now = time.monotonic()
        self._show(done, failed)
        interval_s = min(max(_INTERVAL_S, (now - self._began) / 60), _LONGEST_INTERVAL_S)
        if not force and now - self._printed < interval_s:
            return
        self._printed = now
        print(self._line(done, failed, self._per_s(now, done), detail), flush=True)

    def _show(self, done: int, failed: int) -> None:
        stage, _, what = self._label.partition(": ")
        labels = {"stage": stage, "what": what}
        show(PROGRESS_DONE, done, **labels)
        show(PROGRESS_FAILED, failed, **labels)
        if self._total is not None:
            show(PROGRESS_TOTAL, self._total, **labels)

    def _per_s(self, now: float, done: int) -> float:
        """The pace within the window; 0 where there is none yet."""
        if done < self._seen[-1][1]:
            # Thrown back, as a training is to its newest checkpoint.
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()
        first_time, first_done = self._seen[0]
        return (done - first_done) / (now - first_time) if now > first_time else 0.0

    def _line(self, done: int, failed: int, per_s: float, detail: str) -> str:
        share = f"/{self._total} ({100 * done / self._total:.0f} %)" if self._total else ""
        parts = [f"{self._label} {done}{share}"]
        if per_s:
            parts.append(f"{per_s:.0f}/s" if per_s >= 100 else f"{per_s:.3g}/s")
            if self._total and done < self._total:
                parts.append(f"{duration((self._total - done) / per_s)} left")
        if failed:
            parts.append(f"{failed} failed")
        return ", ".join([*parts, *([detail] if detail else [])])
