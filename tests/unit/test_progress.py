"""What a person reads while a job runs."""

from __future__ import annotations

import pytest

from janus_ray import progress
from janus_ray.progress import ProgressLine, duration


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
    clock = iter([0.0, 1.0, 10.0, 40.0, 41.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = ProgressLine("rows", 400)
    line.update(5)
    line.update(100, "3 failed")
    line.update(400, force=True)
    line.update(400)
    assert capsys.readouterr().out.splitlines() == [
        "rows: 100/400 (25 %), 10/s, 30 s left, 3 failed",
        "rows: 400/400 (100 %), 10/s",
    ]


def test_without_a_total_there_is_no_end_to_name(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = ProgressLine("rows", None)
    line.update(0)
    line.update(40)
    assert capsys.readouterr().out.splitlines() == ["rows: 0, 0/s", "rows: 40, 2/s"]
