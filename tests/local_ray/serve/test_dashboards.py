"""A real Prometheus scrapes the running system, and every panel of the overview gets an answer."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import httpx
import pytest
import ray

from dashboards.generate import ROWS, Panel
from janus_ray import metrics
from janus_ray.data import collect as collecting
from janus_ray.eval import run as evaluating
from janus_ray.metrics import reporting
from janus_ray.miniature.server import TEACHER
from janus_ray.miniature.world import instructions
from janus_ray.provider import providers_running
from janus_ray.store.files import write_jsonl
from janus_ray.train import run as training
from janus_ray.train.recipe import TrainRecipe
from tests import evaluation, tiny
from tests.loopback import Reply, loopback
from tests.prometheus import PROMETHEUS, PROMTOOL, REPOSITORY, Prometheus, prometheus

MODEL = "tiny/model-1.0"
PANELS = [panel for panels in ROWS.values() for panel in panels]
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")


class Deadline:
    """An upper bound that no machine should need, and short waits until then."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._never = threading.Event()

    def __call__(self) -> bool:
        self._never.wait(0.5)
        return time.monotonic() < self._until


@contextmanager
def busy(url: str) -> Generator[None]:
    """More chat requests than the model has room for, while the block runs."""
    stop = threading.Event()
    message = {"role": "user", "content": "What do you value? I value short answers. " * 5}
    body = {"model": MODEL, "messages": [message], "max_tokens": 60, "ignore_eos": True}

    def ask(stream: bool) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.wait(0.2):
                client.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})

    threads = [threading.Thread(target=ask, args=[number % 2 == 0]) for number in range(5)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def once_down(n, body):
    """A policy whose first answer has to be asked for again."""
    return Reply("", 503) if n == 0 else evaluation.obedient(n, body)


def run_stages(folder) -> None:
    """A small collection, evaluation and training, as their jobs run them."""
    write_jsonl(folder / "in.jsonl", instructions()[:8])
    recipe = collecting.CollectRecipe.model_validate(
        {
            "sources": [{"path": str(folder / "in.jsonl"), "source_column": "family"}],
            "output_dir": str(folder / "collection"),
            "teacher": {"provider": "miniature", "model": TEACHER, "max_concurrency": 8},
        }
    )
    with providers_running(recipe):
        collecting.collect(recipe, "fail")
    with loopback(once_down) as policy, loopback(evaluation.strict) as judge:
        evaluate = evaluation.recipe_for(folder, policy.url, judge.url, output_dir=str(folder / "report"))
        evaluating.evaluate(evaluate, "fail")
    base = tiny.write_model(folder / "base")
    training.train(
        TrainRecipe(
            output_dir=str(folder / "sft"),
            base_model=str(base),
            collection=str(tiny.write_collection(folder / "rows", 8)),
            max_length=128,
            bins_per_step=2,
            epochs=4,
            num_workers=1,
            precision="fp32",
            activation_checkpointing=False,
            log_every_steps=1,
            checkpoint_every_steps=1,
        ),
        "fail",
    )


def wait_for_answers(asked: Prometheus, panels: list[Panel], waiting: Deadline) -> None:
    """Until every query of the panels has had an answer, with all that its legend names."""
    due = dict(query for panel in panels for query in panel.queries)
    while due:
        for query, series in {query: asked.ask(query) for query in due}.items():
            if series:
                named = re.findall(r"{{(\w+)}}", due.pop(query))
                assert all(one["metric"].get(label) for one in series for label in named), query
        assert not due or waiting(), f"nothing answers {sorted(due)}"


# Over twenty seconds, because what is on the panels has to happen: a collection, an evaluation, a training, traffic.
@pytest.mark.timeout(600)
def test_every_panel_shows_something(tmp_path, served, monkeypatch):
    for module in (collecting, evaluating, training):
        monkeypatch.setattr(module, "ray_cluster", lambda *arguments, **keywords: nullcontext())
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    waiting = Deadline(400)
    full = [panel for panel in PANELS if not panel.no_data]
    with prometheus(tmp_path, targets, waiting) as asked, reporting():
        run_stages(tmp_path)
        with busy(served.url):
            wait_for_answers(asked, full, waiting)
            # A panel that is listed as empty must be so.
            empty = [panel for panel in PANELS if panel.no_data]
            assert [panel.title for panel in empty for query, _ in panel.queries if asked.ask(query)] == []
            # Also what a query turns into zero where it is not there.
            named = {name for panel in full for query, _ in panel.queries for name in re.findall(r"\bray_\w+", query)}
            never = {metrics.TRAIN_RESTARTS, metrics.GATEWAY_REFUSED_EARLY, metrics.ASKED_LEDGER_HITS}
            assert named - asked.names() <= {metric.series for metric in never}
            # What a gateway reports says whose it is, and no label holds a text of a caller's.
            labels = asked.ask(metrics.GATEWAY_REQUESTS.series)[0]["metric"].keys()
            assert {"model", "status", "kind", "deployment"} <= labels


def test_the_committed_configuration_is_valid():
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "config", str(REPOSITORY / "dashboards" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
