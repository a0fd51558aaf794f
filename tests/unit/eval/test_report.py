from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from janus_ray.eval.aggregate import aggregate
from janus_ray.eval.plots import ForestRow, forest_plot
from janus_ray.eval.report import write_report
from janus_ray.records import BenchItem
from tests.unit.eval.test_aggregate import GENERATIONS, judged, two_prompts
from tests.unit.eval.test_bench import row

EVIL = '<script>alert("values")</script>'


def item(item_id, prompt_id, split):
    return BenchItem.from_row(
        row(prompt=f"How? {EVIL}", system=EVIL, item_id=item_id, prompt_id=prompt_id, split=split)
    )


ITEMS = [item("a", "p", "seen"), item("b", "p", "seen"), item("c", "q", "unseen"), item("d", "q", "unseen")]


def generation(person):
    return {"model": "m", "written_for": person, "response": f"Answer for {person}. {EVIL}", "status": "ok"}


def report_of(judgments, tmp_path, items=ITEMS):
    results = aggregate(judgments, GENERATIONS, ["m"], "m", 0.98)
    results["protocol"] = {"items": len(items), "prompts": 2, "judge": "j"}
    generations = [generation(person) for person in "abcd"]
    write_report(tmp_path / "index.html", results, items, generations, judgments, num_samples=5)
    return (tmp_path / "index.html").read_text()


class _References(HTMLParser):
    """Everything that a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        outside = [value for key, value in attributes if key in ("src", "href", "data") and not value.startswith("#")]
        if tag in ("script", "link", "iframe", "img", "object", "embed") or outside:
            self.found.append((tag, names))


def test_the_report_is_one_file_that_fetches_and_runs_nothing(tmp_path):
    html = report_of(two_prompts(), tmp_path)
    parser = _References()
    parser.feed(html)
    assert parser.found == []
    assert "url(http" not in html and "@import" not in html
    # Texts of models and people are shown, never interpreted.
    assert EVIL not in html
    assert html.count("Answer for c. &lt;script&gt;") == 1


def test_the_report_shows_the_numbers(tmp_path):
    html = report_of(two_prompts(), tmp_path)
    text = re.sub(r"<[^>]+>", " ", html)
    for shown in (
        "4.00",
        "2.75",
        "for 2",
        "seen",
        "unseen",
        "100.0 %",
        "one prompt, no interval",
        "own system - sibling system",
    ):
        assert shown in text, shown
    # seen: own mean 4.5, in the plot
    assert re.search(r">4\.50<", html)


def test_a_withheld_mean_is_said_in_words(tmp_path):
    rows = two_prompts()
    for one in rows[:3]:
        one.update(score=None, status="parse_fail")
    html = report_of(rows, tmp_path)
    assert "withheld" in html
    assert "coverage 62.5 % is below 98 %" in html


def test_a_bench_without_siblings_has_a_report_too(tmp_path):
    rows = [*judged("a", "p", "a", "a", 5, 5), *judged("c", "q", "c", "c", 3, 5, split="unseen")]
    assert "4.50" in report_of(rows, tmp_path, [ITEMS[0], ITEMS[2]])


def test_a_forest_plot_takes_the_pages_colours_and_is_the_same_each_time():
    entry = {"mean": 4.0, "low": 3.5, "high": 6.0}
    rows = [ForestRow("<b>"), ForestRow("own", entry, "#123456"), ForestRow("none", {"mean": None, "low": None})]
    svg = forest_plot(rows, 'means "all"')
    assert svg == forest_plot(rows, 'means "all"')
    assert svg.startswith("<svg") and "currentColor" in svg and "#010101" not in svg
    assert "&lt;b&gt;" in svg and "no score" in svg and "#123456" in svg
    assert 'aria-label="means &#34;all&#34;"' in svg


@pytest.mark.parametrize("estimate", [{"mean": 3.0, "low": None, "high": None}])
def test_a_mean_without_an_interval_is_a_point_alone(estimate):
    assert ">3.00<" in forest_plot([ForestRow("x", estimate)], "x")
