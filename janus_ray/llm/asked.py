"""What is counted of requests: kept where they are asked, and reported by the driver.

A client process is ended before Ray would have sent its last counts off; the driver lives until they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from janus_ray.llm.request import Completion
from janus_ray.metrics import (
    ASKED,
    ASKED_LEDGER_HITS,
    ASKED_RETRIES,
    ASKED_SENT,
    ASKED_TOKENS,
    Metric,
    count,
)

Counts = Counter[tuple[Metric, tuple[str, ...]]]
"""By metric and the values of its labels."""


def add_outcome(counts: Counts, request: str, completion: Completion) -> None:
    """Counts an outcome; what the ledger knew was sent and paid for by an earlier run.

    Args:
        counts: added to.
        request: what kind of request it was.
        completion: what came of it.
    """
    counts[ASKED, (request, completion.error_kind or "ok")] += 1
    if not completion.sent:
        counts[ASKED_LEDGER_HITS, (request,)] += 1
        return
    counts[ASKED_SENT, (request,)] += completion.sent
    counts[ASKED_RETRIES, (request,)] += completion.sent - 1
    counts[ASKED_TOKENS, (request, "prompt")] += completion.usage.prompt_tokens
    counts[ASKED_TOKENS, (request, "completion")] += completion.usage.completion_tokens


def report(counts: Mapping[tuple[Metric, tuple[str, ...]], int]) -> None:
    """Reports what was counted as metrics."""
    for (metric, labels), value in counts.items():
        count(metric, value, **dict(zip(metric.labels, labels, strict=True)))
