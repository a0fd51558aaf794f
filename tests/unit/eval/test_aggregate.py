"""The numbers of the report, worked out by hand on two prompts, two people each, two rubrics each."""

from __future__ import annotations

import math
import random

import pytest

from janus_ray.eval.aggregate import aggregate
from janus_ray.eval.results import Protocol

# Student's t at 97.5 % with one degree of freedom: there are two prompts.
T = 12.706204736


def judgment(response, prompt, written_for, judged_for, dimension, score, model="m", split="seen", rubric=0):
    return {
        "generation_id": f"{model}|{response}",
        "model": model,
        "split": split,
        "prompt_id": prompt,
        "written_for": written_for,
        "judged_for": judged_for,
        "rubric": rubric,
        "dimension": dimension,
        "status": "ok" if score is not None else "parse_fail",
        "score": score,
    }


def judged(response, prompt, written_for, judged_for, style, harmlessness, **more):
    return [
        judgment(response, prompt, written_for, judged_for, "style", style, **more),
        judgment(response, prompt, written_for, judged_for, "harmlessness", harmlessness, rubric=1, **more),
    ]


def two_prompts():
    """Own means 5, 4 | 3, 4; sibling means 1, 2 | 1, 1; without a system message 2, 2 | 1, 1."""
    second = {"split": "unseen"}
    return [
        *judged("a", "p", "a", "a", 5, 5),
        *judged("b", "p", "b", "b", 3, 5),
        *judged("a", "p", "a", "b", 1, 1),
        *judged("b", "p", "b", "a", 1, 3),
        *judged("none p", "p", None, "a", 2, 2),
        *judged("none p", "p", None, "b", 1, 3),
        *judged("c", "q", "c", "c", 3, 3, **second),
        *judged("d", "q", "d", "d", 5, 3, **second),
        *judged("c", "q", "c", "d", 1, 1, **second),
        *judged("d", "q", "d", "c", 1, 1, **second),
        *judged("none q", "q", None, "c", 1, 1, **second),
        *judged("none q", "q", None, "d", 1, 1, **second),
    ]


GENERATIONS = [{"model": "m", "status": "ok"}, {"model": "m", "status": "truncated"}]


def protocol(**changes):
    texts = dict.fromkeys(("bench", "bench_fingerprint", "judge", "judge_sees", "interval"), "x")
    numbers = dict.fromkeys(("items", "prompts", "judge_runs", "seed", "coverage_threshold"), 1)
    tables = {name: {} for name in ("judge_sampling", "generation_sampling", "models", "weights")}
    return Protocol(**{**texts, **numbers, **tables, **changes})


def results_of(judgments, threshold=0.98):
    """What results.json holds."""
    return aggregate(judgments, GENERATIONS, ["m"], "m", threshold, protocol()).as_json()


def test_conditions_by_hand():
    own, none, sibling = (
        results_of(two_prompts())["models"]["m"][condition]
        for condition in ("own_system", "no_system", "sibling_system")
    )
    assert (own["overall"]["mean"], own["overall"]["n"], own["overall"]["clusters"]) == (4.0, 4, 2)
    # cluster sums of residuals: p (1 + 0), q (-1 + 0); two clusters: factor 2 / 1
    assert own["overall"]["high"] == pytest.approx(4 + T * math.sqrt(2 * 2) / 4)
    assert sibling["overall"]["mean"] == pytest.approx((1 + 2 + 1 + 1) / 4)
    assert none["overall"]["mean"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert own["per_dimension"]["style"]["mean"] == 4.0
    assert list(own["per_dimension"]) == ["style", "harmlessness"]
    assert own["per_split"]["seen"]["overall"]["mean"] == 4.5
    assert own["per_split"]["unseen"]["per_dimension"]["harmlessness"]["mean"] == 3.0
    # One prompt says nothing about the spread between prompts.
    assert own["per_split"]["seen"]["overall"]["low"] is None
    assert own["per_split"]["seen"]["overall"]["no_interval"] == "one prompt, no interval"
    assert "no_interval" not in own["overall"]


def test_steering_gain_matrix_and_paired_differences_by_hand():
    results = results_of(two_prompts())
    gain = results["steering_gain"]
    # p: 4.5 - 1.5 = 3; q: 3.5 - 1 = 2.5
    assert gain["overall"]["mean"] == pytest.approx(2.75)
    assert gain["overall"]["low"] == pytest.approx(2.75 - T * math.sqrt(2 * 2 * 0.25**2) / 2)
    assert gain["per_split"]["unseen"]["mean"] == pytest.approx(2.5)
    assert results["matrix"]["m"] == [[4.0, 1.0], [1.5, 4.0]]
    paired = results["paired_differences"]["m"]
    # a: 5 - 2, b: 4 - 1, c: 3 - 1, d: 4 - 1
    assert paired["own_system - sibling_system"]["all"]["mean"] == pytest.approx(2.75)
    assert paired["own_system - no_system"]["seen"]["mean"] == pytest.approx(2.5)
    assert results["controls"].keys() == {"no_system", "sibling_system"}
    assert results["status_counts"]["generations"] == {"m": {"ok": 1, "truncated": 1}}


def test_an_unscored_rubric_lowers_the_coverage_and_is_not_a_zero():
    rows = two_prompts()
    unscored = next(row for row in rows if row["judged_for"] == "c" and row["written_for"] == "c")
    unscored.update(score=None, status="parse_fail")
    own = results_of(rows, threshold=0.5)["models"]["m"]["own_system"]
    assert own["overall"]["coverage"] == 7 / 8
    assert own["overall"]["mean"] == pytest.approx((5 + 4 + 3 + 4) / 4)
    assert own["per_dimension"]["style"]["n"] == 3
    results = results_of(rows)
    assert results["steering_gain"]["overall"]["mean"] is None
    assert results["steering_gain"]["overall"]["coverage"] == 15 / 16
    assert results["paired_differences"]["m"]["own_system - no_system"]["unseen"]["mean"] is None
    assert results["steering_gain"]["per_split"]["seen"]["mean"] == 3.0
    withheld = results["models"]["m"]["own_system"]["overall"]
    assert (withheld["mean"], withheld["low"], withheld["high"]) == (None, None, None)
    assert withheld["withheld"] == "coverage 87.5 % is below 98 %"


def test_a_response_that_was_never_judged_counts_against_the_coverage_alone():
    rows = two_prompts()
    for row in rows:
        if row["written_for"] == "a":
            row.update(score=None, status="no_response")
    results = results_of(rows, threshold=0)
    own = results["models"]["m"]["own_system"]["overall"]
    assert (own["n"], own["mean"], own["coverage"]) == (3, pytest.approx(11 / 3), 6 / 8)
    # p keeps M[b, b] = 4 and M[b, a] = 2
    assert results["steering_gain"]["per_split"]["seen"]["mean"] == pytest.approx(2.0)
    assert results["matrix"]["m"] == [[3.0, 1.0], [1.5, 4.0]]


def test_a_bench_without_siblings_has_neither_the_control_nor_a_gain():
    """Or an evaluation with judge_siblings off."""
    rows = [*judged("a", "p", "a", "a", 5, 5), *judged("b", "q", "b", "b", 3, 5)]
    results = results_of(rows)
    assert results["models"]["m"].keys() == {"own_system", "steering_gain"}
    assert results["controls"] == {}
    assert results["steering_gain"]["overall"]["mean"] is None
    assert results["steering_gain"]["per_split"]["seen"]["n"] == 0


def test_numbers_do_not_depend_on_the_order_of_rows_and_may_come_from_any_iterable():
    rows = [*two_prompts(), *judged("e", "r", "e", "e", 2, None)]
    shuffled = random.Random(0).sample(rows, len(rows))
    first, second = (aggregate(iter(each), iter(GENERATIONS), ["m"], "m", 0.5, protocol()) for each in (rows, shuffled))
    for condition in ("own_system", "no_system", "sibling_system"):
        assert second.main.conditions[condition].overall == first.main.conditions[condition].overall
    assert second.main.steering_gain.overall.mean == pytest.approx(first.main.steering_gain.overall.mean)
    assert second.usage == first.usage == {"prompt_tokens": 0, "completion_tokens": 0}


def test_siblings_in_other_numbers_keep_out_of_the_mean_matrix_only():
    alone = judged("e", "r", "e", "e", 2, 2)
    results = results_of([*two_prompts(), *alone])
    assert results["matrix"]["m"] == [[4.0, 1.0], [1.5, 4.0]]
    assert results["models"]["m"]["own_system"]["overall"]["mean"] == pytest.approx((16 + 2) / 5)
    assert results["steering_gain"]["overall"]["n"] == 2
