"""Every metric this project reports: name, unit, help. Code, dashboards and docs take them from here.

Labels are bounded on purpose (dimension, stage, status, model): never a profile, a prompt or a value's text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One reported number."""

    name: str
    unit: str
    help: str


LOSS = Metric("loss", "nats/token", "cross-entropy, mean over the supervised tokens of the global batch")
LEARNING_RATE = Metric("learning_rate", "1", "learning rate of the step")
GRAD_NORM = Metric("grad_norm", "1", "L2 norm of the whole gradient before clipping")
TOKENS_PER_S = Metric("tokens_per_s", "tokens/s", "tokens trained on per second, all workers, padding not counted")
MFU = Metric("mfu", "1", "model FLOPs used as a share of the device's peak; null where the peak is unknown")
PADDING_SHARE = Metric("padding_share", "1", "share of the positions of the step's bins that hold padding")
SUPERVISED_TOKENS = Metric("supervised_tokens", "tokens", "tokens of the step that carry loss, all workers")

TRAIN = (LOSS, LEARNING_RATE, GRAD_NORM, TOKENS_PER_S, MFU, PADDING_SHARE, SUPERVISED_TOKENS)

GATEWAY_REQUESTS = Metric("janus_gateway_requests", "requests", "chat requests by model, status class and kind")
GATEWAY_LATENCY = Metric("janus_gateway_latency_ms", "ms", "time from request to last byte, by model and kind")
GATEWAY_REFUSED_EARLY = Metric(
    "janus_gateway_refused_early", "requests", "chat requests that the HTTP proxy refused because everything was full"
)

SERVE = (GATEWAY_REQUESTS, GATEWAY_LATENCY, GATEWAY_REFUSED_EARLY)

ALL = (*TRAIN, *SERVE)
