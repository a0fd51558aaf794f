from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.eval.aggregate import aggregate
from janus_ray.eval.benchmarks.multifaceted import SCALE
from janus_ray.eval.items import BenchItem
from janus_ray.eval.plots import ForestRow, forest_plot
from janus_ray.eval.report import write_report
from janus_ray.eval.results import Measure, Results, Scale
from janus_ray.eval.samples import collected_samples
from janus_ray.eval.summary import print_summary
from janus_ray.store.files import read_json, write_json
from tests.unit.eval.test_aggregate import GENERATIONS, judged, judgment, protocol, two_prompts
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
    results = aggregate(judgments, GENERATIONS, ["m"], "m", 0.98, protocol())
    samples = collected_samples("m", items, [generation(person) for person in "abcd"], judgments, 5)
    write_report(tmp_path / "index.html", results, samples)
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
    rows = [ForestRow("<b>"), ForestRow("own", measure(4.0, 3.5, 6.0), "#123456"), ForestRow("none", measure(None))]
    svg = forest_plot(rows, SCALE, 'means "all"')
    assert svg == forest_plot(rows, SCALE, 'means "all"')
    assert svg.startswith("<svg") and "currentColor" in svg and "#010101" not in svg
    assert "&lt;b&gt;" in svg and "no score" in svg and "#123456" in svg
    assert 'aria-label="means &#34;all&#34;"' in svg


def measure(mean, low=None, high=None):
    return Measure(mean=mean, low=low, high=high, n=2, clusters=2, coverage=1, scored=2, due=2)


def test_a_mean_without_an_interval_is_a_point_alone():
    assert ">3.00<" in forest_plot([ForestRow("x", measure(3.0))], SCALE, "x")


def test_another_scale_is_drawn_from_end_to_end():
    svg = forest_plot([ForestRow("x", measure(7.5, 6.0, 12.0))], Scale(lowest=0, highest=10), "x")
    assert ">0<" in svg and ">10<" in svg and ">7.50  [6.00, 12.00]<" in svg


# Names of splits, dimensions and models that are formulas, markup, control characters, or no text at all.
NAMES = [
    "price $$", "$\\foo$", "a_b^c{", "\\frac{", "%s %", "[/red]x", "[bold]y", ":smile:", "{{ 7 * 7 }}", "{% if %}",
    "<b>z</b>", "&amp;", "a\nb", "nul\x00", "bell\x07", "שלום\u202e", "漢字", "👩‍👩‍👧", "", "x" * 5000,
    "all", "3", "None",
]  # fmt: skip


def strange_rows(model, conditions=("own", "none")):
    """One prompt for each name; every prompt but the last has two people."""
    rows = []
    for number, name in enumerate(NAMES):
        people = (f"{number}a", f"{number}b")[: 1 if number == len(NAMES) - 1 else 2]
        for judged_for in people:
            written = [*(people if "own" in conditions else ()), *((None,) if "none" in conditions else ())]
            for written_for in written:
                one = judgment(f"{written_for} {number}", str(number), written_for, judged_for, name, 1 + number % 5)
                rows.append({**one, "model": model, "generation_id": f"{model}|{one['generation_id']}", "split": name})
    return rows


def strange_items():
    return [
        replace(item(f"{number}{person}", str(number), "x"), split=name)
        for number, name in enumerate(NAMES)
        for person in "ab"[: 1 if number == len(NAMES) - 1 else 2]
    ]


def shown(results, items, judgments, tmp_path, capsys):
    """The report and the terminal."""
    main = results.main_model
    generations = [{"model": main, "written_for": one.item_id, "response": "R\x00", "status": "ok"} for one in items]
    write_json(tmp_path / "results.json", results.as_json())
    assert Results.from_json(read_json(tmp_path / "results.json")) == results
    print_summary(results)
    write_report(tmp_path / "index.html", results, collected_samples(main, items, generations, judgments, 30))
    return (tmp_path / "index.html").read_text(), capsys.readouterr().out


def test_no_name_keeps_the_numbers_from_being_shown(tmp_path, capsys):
    strange = protocol(judge="[/j] $$")
    models = ["[/red]m $$", "second\n{{ x }}", "without conditions"]
    judgments = [*strange_rows(models[0]), *strange_rows(models[1], ("none",))]
    results = aggregate(judgments, [{"model": models[0], "status": "ok"}], models, models[0], 0.98, strange)
    html, terminal = shown(results, strange_items(), judgments, tmp_path, capsys)
    for name in ("price $$", "$\\foo$", "[/red]x", ":smile:", "漢字", "3"):
        assert name in terminal and f">{name}<" in html, name
    assert "&lt;b&gt;z&lt;/b&gt;" in html and "<b>z</b>" not in html and "{{ 7 * 7 }}" in html
    assert "without conditions" in terminal and "without conditions" in html
    assert "\x07" not in terminal + html and "x" * 100 not in terminal
    plain = results.as_json()
    own = plain["models"][models[0]]["own_system"]
    assert len(own["per_split"]) == len(NAMES)
    # The last prompt has one person: nothing is measured for a sibling there, and nothing is made up.
    sibling = plain["models"][models[0]]["sibling_system"]["per_split"]["None"]["overall"]
    assert (sibling["n"], sibling["mean"], sibling["withheld"]) == (0, None, "not measured")
    assert json.loads((tmp_path / "results.json").read_text())["main_model"] == models[0]


def test_nothing_scored_at_all_is_a_report_too(tmp_path, capsys):
    judgments = [{**row, "score": None, "status": "api_fail"} for row in strange_rows("m")]
    results = aggregate(judgments, [], ["m"], "m", 0.98, protocol())
    html, terminal = shown(results, strange_items(), judgments, tmp_path, capsys)
    assert "coverage 0.0 % is below 98 %" in html and "none" in terminal
    assert results.main.steering_gain.overall.mean is None


@settings(max_examples=8, deadline=None)
@given(st.text(max_size=30))
def test_any_label_can_be_drawn(label):
    svg = forest_plot([ForestRow(label), ForestRow("x", measure(3.0, 2.0, 4.0))], SCALE, "x")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
