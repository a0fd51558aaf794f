"""How metrics reach Ray: only where it runs, with what was declared, and kept visible."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from janus_ray import metrics
from janus_ray.metrics import ASKED, GATEWAY_LATENCY, LOSS, PROGRESS_DONE, count, instrument, reporting, show


class Recorder:
    """Stands in for one of Ray's instruments."""

    def __init__(self, name, description, tag_keys=(), boundaries=None):
        self.name, self.tag_keys, self.boundaries = name, tag_keys, boundaries
        self.got: list[tuple] = []
        self.reached = threading.Event()

    def inc(self, value, tags):
        self.got.append((value, tags))

    def set(self, value, tags):
        self.got.append((value, tags))
        if len(self.got) >= 3:
            self.reached.set()


LIBRARY = SimpleNamespace(Counter=Recorder, Gauge=Recorder, Histogram=Recorder)


@pytest.fixture
def ray(monkeypatch):
    """A process in a Ray cluster, with recorders that are listed."""
    recorders: dict[str, Recorder] = {}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(metrics, "_recorders", recorders)
    for metric in metrics.ALL:
        recorders[metric] = instrument(metric, LIBRARY)
    return recorders


def test_an_instrument_is_what_was_declared():
    latency = instrument(GATEWAY_LATENCY, LIBRARY)
    assert (latency.name, latency.tag_keys) == ("janus_gateway_latency_ms", ("model", "status", "kind"))
    assert latency.boundaries == list(GATEWAY_LATENCY.bounds)
    assert GATEWAY_LATENCY.series == "ray_janus_gateway_latency_ms" and ASKED.series == "ray_janus_asked_total"


@pytest.mark.parametrize("ray", [None, SimpleNamespace(is_initialized=lambda: False)])
def test_without_ray_nothing_is_recorded(monkeypatch, ray):
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(metrics, "_recorders", {})
    count(ASKED, stage="collect", status="ok")
    show(LOSS, 1.0)
    assert not metrics._recorders and not metrics._shown


def test_a_counter_is_given_what_there_is_to_add(ray):
    count(ASKED, stage="collect", status="ok")
    count(ASKED, 0, stage="collect", status="ok")
    count(ASKED, 5, stage="collect", status="timeout")
    assert ray[ASKED].got == [
        (1, {"stage": "collect", "status": "ok"}),
        (5, {"stage": "collect", "status": "timeout"}),
    ]


def test_a_gauge_stays_visible_until_the_block_ends_with_its_last_value(ray, monkeypatch):
    monkeypatch.setattr(metrics, "_REFRESH_S", 0.001)
    labels = {"stage": "train", "what": "step"}
    with reporting():
        show(PROGRESS_DONE, 1, **labels)
        show(PROGRESS_DONE, 2, **labels)
        assert ray[PROGRESS_DONE].reached.wait(60)
    got = ray[PROGRESS_DONE].got
    assert got[-1] == (2, labels) and [value for value, _ in got] == sorted(value for value, _ in got)
    assert not metrics._shown
    assert "janus-metrics" not in {thread.name for thread in threading.enumerate()}
