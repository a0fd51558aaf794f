"""What a person reads while a job runs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from janus_ray import progress
from janus_ray.progress import ProgressLine, duration
from janus_ray.train import run


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (200_000, "55 h 33 min"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_a_line_says_how_much_is_done_how_fast_and_how_long_it_takes_yet(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 11.0, 41.0, 42.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = ProgressLine("collect: rows", 400)
    line.update(0)
    line.update(100, "120 requests sent", failed=3)
    line.update(400, force=True)
    line.update(400)
    assert capsys.readouterr().out.splitlines() == [
        "collect: rows 100/400 (25 %), 10/s, 30 s left, 3 failed, 120 requests sent",
        "collect: rows 400/400 (100 %), 10/s",
    ]


@pytest.fixture
def lines_at(monkeypatch, capsys):
    """What a line prints at given times for given counts."""

    def printed(total: int | None, *seen: tuple[float, int]) -> list[str]:
        clock = iter([0.0, *(when for when, _ in seen)])
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        line = ProgressLine("train: step", total)
        for _, done in seen:
            line.update(done)
        return [text.removeprefix("train: step ") for text in capsys.readouterr().out.splitlines()]

    return printed


def test_the_pace_is_that_of_the_last_minute(lines_at):
    # A ledger knew the first 1000; what is left goes at the pace of what is new.
    assert lines_at(1200, (2, 1000), (62, 1060), (122, 1120))[1:] == [
        "1060/1200 (88 %), 1/s, 2 min 20 s left",
        "1120/1200 (93 %), 1/s, 1 min 20 s left",
    ]


def test_a_pace_starts_with_the_first_and_again_after_being_thrown_back(lines_at):
    # Workers took ten seconds to start; a restart does steps again.
    assert lines_at(500, (10, 300), (20, 301), (30, 290), (50, 295)) == [
        "300/500 (60 %)",
        "301/500 (60 %), 0.1/s, 33 min 10 s left",
        "290/500 (58 %)",
        "295/500 (59 %), 0.25/s, 13 min 40 s left",
    ]


def test_more_than_there_should_be_is_no_time_left(lines_at):
    assert lines_at(10, (10, 5), (20, 15)) == ["5/10 (50 %)", "15/10 (150 %), 1/s"]


def test_lines_become_fewer_the_longer_it_takes(lines_at):
    hour = 3600
    seen = [(float(second), second) for second in range(1, 9 * hour)]
    times = [int(line.split(",")[0]) for line in lines_at(None, *seen)]
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[:2] == [2, 2] and gaps[-1] == 60 and gaps == sorted(gaps) and len(gaps) < 900


def test_without_a_total_there_is_no_end_to_name(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = ProgressLine("collect: rows")
    line.update(0)
    line.update(40)
    assert capsys.readouterr().out.splitlines() == ["collect: rows 0", "collect: rows 40, 4/s"]


REST = {"loss": 1, "learning_rate": 1e-5, "grad_norm": 1, "tokens_per_s": 9, "mfu": None, "padding_share": 0.25}


def test_a_training_says_how_long_it_takes_yet(monkeypatch, capsys):
    lines = [{"step": step, "num_steps": 500, **REST} for step in (1, 101, 500)]
    # The first line starts the clock.
    clock = iter([0.0, 0.0, 50.0, 250.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    follow = run.StepLines()
    for line in lines:
        follow(line)
    values = "loss 1.0000, lr 1.00e-05, grad 1.00, 9 tokens/s, padding 25.0 %"
    assert capsys.readouterr().out.splitlines() == [
        f"train: step 1/500 (0 %), {values}",
        f"train: step 101/500 (20 %), 2/s, 3 min 20 s left, {values}",
        f"train: step 500/500 (100 %), 2/s, {values}",
    ]


@pytest.fixture
def shown(monkeypatch):
    """What a dashboard is told: metric and labels, and the last value."""
    seen: dict[tuple[str, ...], float] = {}

    def show(metric, value, **labels):
        assert tuple(labels) == metric.labels
        seen[metric.name, *labels.values()] = value

    monkeypatch.setattr(progress, "show", show)
    return seen


def test_what_is_printed_is_a_metric_too(monkeypatch, shown):
    clock = iter([0.0, 5.0, 15.0, 16.0, 40.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = ProgressLine("evaluate: responses of m", 400)
    line.update(0)
    line.update(100, failed=3)
    of = ("evaluate", "responses of m")
    assert shown == {
        ("janus_progress_done", *of): 100,
        ("janus_progress_total", *of): 400,
        ("janus_progress_failed", *of): 3,
        ("janus_progress_left_s", *of): 30,
    }
    # Between two lines as well.
    line.update(111, failed=4)
    assert shown["janus_progress_done", *of] == 111 and shown["janus_progress_failed", *of] == 4
    line.update(400, failed=4)
    assert shown["janus_progress_left_s", *of] == 0


def test_a_step_of_a_training_is_metrics_too(shown):
    line = ProgressLine("train: step", 500)
    progress.report_step(line, {"step": 7, "num_steps": 500, **REST, "mfu": 0.4})
    assert shown["janus_train_loss",] == 1 and shown["janus_train_padding_share",] == 0.25
    assert shown["janus_train_mfu",] == 0.4 and shown["janus_progress_done", "train", "step"] == 7
    shown.clear()
    progress.report_step(line, {"step": 8, "num_steps": 500, **REST})
    assert ("janus_train_mfu",) not in shown
