"""Every metric this project reports: name, kind, unit, help. Code, dashboards and docs take them from here.

What Ray and vLLM export themselves (queues, replicas, the engine's time to first token, tokens, prefix cache) is used
as it is and not reported a second time. Labels are bounded on purpose (stage, kind of request, status, model): never a
profile, a prompt or a value's text.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

# Ray's own agents forget a gauge that is not set again within two of their reports, which are a second apart at least.
_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One reported number."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""

    @property
    def series(self) -> str:
        """The name that Prometheus has it under; a histogram adds _bucket, _sum and _count to it."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


_STEP = ("stage", "what")
PROGRESS_DONE = Metric(
    "janus_progress_done", "gauge", "1", "how many of a stage's rows, requests or steps are done", _STEP
)
PROGRESS_TOTAL = Metric("janus_progress_total", "gauge", "1", "how many there will be, where that is known", _STEP)
PROGRESS_FAILED = Metric("janus_progress_failed", "gauge", "1", "how many of those done have failed", _STEP)
PROGRESS_LEFT = Metric(
    "janus_progress_left_s", "gauge", "s", "how long it takes yet, at the pace of the last minute", _STEP
)

PROGRESS = (PROGRESS_DONE, PROGRESS_TOTAL, PROGRESS_FAILED, PROGRESS_LEFT)

ASKED = Metric(
    "janus_asked",
    "counter",
    "requests",
    "requests that have an outcome, by status: ok or the kind of error",
    ("request", "status"),
)
ASKED_SENT = Metric(
    "janus_asked_sent", "counter", "requests", "requests sent over the wire, retries included", ("request",)
)
ASKED_RETRIES = Metric("janus_asked_retries", "counter", "requests", "attempts after the first", ("request",))
ASKED_LEDGER_HITS = Metric(
    "janus_asked_ledger_hits",
    "counter",
    "requests",
    "requests that the ledger knew, so that nothing was sent",
    ("request",),
)
ASKED_TOKENS = Metric(
    "janus_asked_tokens",
    "counter",
    "tokens",
    "tokens of answers that were paid for now, by kind: prompt or completion",
    ("request", "kind"),
)

ASK = (ASKED, ASKED_SENT, ASKED_RETRIES, ASKED_LEDGER_HITS, ASKED_TOKENS)

LOSS = Metric(
    "janus_train_loss", "gauge", "nats/token", "cross-entropy, mean over the supervised tokens of the global batch"
)
LEARNING_RATE = Metric("janus_train_learning_rate", "gauge", "1", "learning rate of the step")
GRAD_NORM = Metric("janus_train_grad_norm", "gauge", "1", "L2 norm of the whole gradient before clipping")
TOKENS_PER_S = Metric(
    "janus_train_tokens_per_s", "gauge", "tokens/s", "tokens trained on per second, all workers, padding not counted"
)
MFU = Metric(
    "janus_train_mfu",
    "gauge",
    "1",
    "model FLOPs used as a share of the device's peak; absent where the peak is unknown",
)
PADDING_SHARE = Metric(
    "janus_train_padding_share", "gauge", "1", "share of the positions of the step's bins that hold padding"
)
SUPERVISED_TOKENS = Metric(
    "janus_train_supervised_tokens", "gauge", "tokens", "tokens of the step that carry loss, all workers"
)
CHECKPOINT_S = Metric("janus_train_checkpoint_s", "gauge", "s", "seconds that the newest checkpoint took to write")
TRAIN_RESTARTS = Metric(
    "janus_train_restarts", "counter", "1", "times that the workers were started again after a failure"
)

# What a line of metrics.jsonl holds, by the name that the metric has there.
STEP_LOG = {
    "loss": LOSS,
    "learning_rate": LEARNING_RATE,
    "grad_norm": GRAD_NORM,
    "tokens_per_s": TOKENS_PER_S,
    "mfu": MFU,
    "padding_share": PADDING_SHARE,
    "supervised_tokens": SUPERVISED_TOKENS,
    "checkpoint_s": CHECKPOINT_S,
}

TRAIN = (*STEP_LOG.values(), TRAIN_RESTARTS)

GATEWAY_REQUESTS = Metric(
    "janus_gateway_requests",
    "counter",
    "requests",
    "chat requests by model, HTTP status and kind",
    ("model", "status", "kind"),
)
GATEWAY_LATENCY = Metric(
    "janus_gateway_latency_ms",
    "histogram",
    "ms",
    "time from request to last byte, by model, HTTP status and kind",
    ("model", "status", "kind"),
    (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 120_000),
)
GATEWAY_REFUSED_EARLY = Metric(
    "janus_gateway_refused_early",
    "counter",
    "requests",
    "chat requests that the HTTP proxy refused because everything was full",
)

SERVE = (GATEWAY_REQUESTS, GATEWAY_LATENCY, GATEWAY_REFUSED_EARLY)

ALL = (*PROGRESS, *ASK, *TRAIN, *SERVE)


def instrument(metric: Metric, library: Any) -> Any:
    """What records a metric in this process.

    Args:
        metric: one of those above.
        library: `ray.util.metrics`, or `ray.serve.metrics` in a replica, which adds deployment and replica.
    """
    if metric.kind == "histogram":
        return library.Histogram(metric.name, metric.help, boundaries=list(metric.bounds), tag_keys=metric.labels)
    kind = library.Counter if metric.kind == "counter" else library.Gauge
    return kind(metric.name, metric.help, tag_keys=metric.labels)


def count(metric: Metric, value: float = 1, **labels: str) -> None:
    """Adds to a counter, where this process is part of a Ray cluster; nothing happens elsewhere."""
    if value and (recorder := _recorder(metric)):
        recorder.inc(value, tags=labels)


def show(metric: Metric, value: float, **labels: str) -> None:
    """Sets a gauge, where this process is part of a Ray cluster; within `reporting` it stays until the end."""
    if recorder := _recorder(metric):
        with _lock:
            recorder.set(value, tags=labels)
            _shown[metric, tuple(sorted(labels.items()))] = value


_recorders: dict[Metric, Any] = {}
_shown: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
# So that refreshing never puts an older value in the place of a newer one.
_lock = threading.Lock()


def _recorder(metric: Metric) -> Any:
    # Not an import: where Ray is not loaded there is nobody to report to.
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    if metric not in _recorders:
        from ray.util import metrics

        _recorders[metric] = instrument(metric, metrics)
    return _recorders[metric]


@contextmanager
def reporting() -> Generator[None]:
    """Within the block what was set stays visible: a step may take minutes, and Ray forgets a gauge within seconds."""
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(_REFRESH_S):
            with _lock:
                for (metric, labels), value in _shown.items():
                    if recorder := _recorder(metric):
                        recorder.set(value, tags=dict(labels))

    thread = threading.Thread(target=refresh, name="janus-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _shown.clear()
