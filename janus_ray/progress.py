"""What a person sees while a job runs, and what a dashboard sees of it: done, rate, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from janus_ray.metrics import PROGRESS_DONE, PROGRESS_FAILED, PROGRESS_LEFT, PROGRESS_TOTAL, STEP_LOG, show

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

    In the first two minutes a line every two seconds at most, later ever fewer, down to one a minute. `total` may
    change.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        """Sets what is counted; the pace begins with the first update, as the start of workers is no measure of it.

        Args:
            label: the stage and what is counted, as in "collect: rows".
            total: how many there will be, where known.
        """
        self._label, self.total = label, total
        stage, _, what = label.partition(": ")
        self._labels = {"stage": stage, "what": what}
        self._began = self._printed = time.monotonic()
        # Times and counts within the window; the first may be older.
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int, detail: str = "", *, failed: int = 0, force: bool = False) -> None:
        """Reports the state; prints it when the interval has passed, or when forced.

        Args:
            done: how many are done, those that failed among them.
            detail: what else is worth a word.
            failed: how many of those done have failed.
            force: print now.
        """
        now = time.monotonic()
        if not self._seen or done < self._seen[-1][1]:
            # The first, or thrown back, as a training is to its newest checkpoint.
            self._seen = deque([(now, done)])
        self._show(done, failed)
        interval_s = min(max(_INTERVAL_S, (now - self._began) / 60), _LONGEST_INTERVAL_S)
        if not force and now - self._printed < interval_s:
            return
        self._printed = now
        per_s = self._per_s(now, done)
        left_s = (self.total - done) / per_s if self.total and per_s and done <= self.total else None
        if left_s is not None:
            show(PROGRESS_LEFT, left_s, **self._labels)
        print(self._line(done, failed, per_s, left_s, detail), flush=True)

    def _show(self, done: int, failed: int) -> None:
        show(PROGRESS_DONE, done, **self._labels)
        show(PROGRESS_FAILED, failed, **self._labels)
        if self.total is not None:
            show(PROGRESS_TOTAL, self.total, **self._labels)
        if done == self.total:
            show(PROGRESS_LEFT, 0, **self._labels)

    def _per_s(self, now: float, done: int) -> float:
        """The pace within the window; 0 where there is none yet."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()
        first_time, first_done = self._seen[0]
        return (done - first_done) / (now - first_time) if now > first_time else 0.0

    def _line(self, done: int, failed: int, per_s: float, left_s: float | None, detail: str) -> str:
        share = f"/{self.total} ({100 * done / self.total:.0f} %)" if self.total else ""
        parts = [f"{self._label} {done}{share}"]
        if per_s:
            parts.append(f"{per_s:.0f}/s" if per_s >= 100 else f"{per_s:.3g}/s")
        if left_s:
            parts.append(f"{duration(left_s)} left")
        if failed:
            parts.append(f"{failed} failed")
        return ", ".join([*parts, *([detail] if detail else [])])


def report_step(progress: ProgressLine, record: Mapping[str, float | None]) -> None:
    """Reports a line of a training's step log, on the terminal and as metrics.

    Args:
        progress: the line, which counts steps.
        record: step, and what `metrics.STEP_LOG` names; null where it is not known.
    """
    known = {name: value for name, value in record.items() if value is not None}
    for name, metric in STEP_LOG.items():
        if name in known:
            show(metric, known[name])
    mfu = f"MFU {100 * known['mfu']:.1f} %, " if "mfu" in known else ""
    detail = (
        f"loss {known['loss']:.4f}, lr {known['learning_rate']:.2e}, grad {known['grad_norm']:.2f}, "
        f"{known['tokens_per_s']:.0f} tokens/s, {mfu}padding {100 * known['padding_share']:.1f} %"
    )
    progress.update(int(known["step"]), detail, force=True)
