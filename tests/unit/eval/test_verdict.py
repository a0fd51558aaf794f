from __future__ import annotations

import pytest

from janus_ray.eval.verdict import parse_verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Feedback: fine. [RESULT] 4", 4),
        ("Feedback: fine. [RESULT]: 4", 4),
        ("Feedback: fine. [RESULT] **3**", 3),
        ("Feedback: fine. [RESULT] (5)", 5),
        ("Feedback: fine. [result] [2]", 2),
        ("Feedback: fine. [RESULT] 4/5", 4),
        ("Feedback: fine. [RESULT] 4.0", 4),
        ("Feedback: fine. [RESULT] 4.", 4),
        ("Feedback: fine.\n[RESULT]\n1\n", 1),
        # The judge quotes the form before it uses it.
        ("I answer with [RESULT] (the score). Feedback: weak. [RESULT] 2", 2),
        ("[RESULT] 5 would be too kind.\n[RESULT] 3", 3),
        # Never moved to the nearest allowed score, never a default.
        ("[RESULT] 0", None),
        ("[RESULT] 6", None),
        ("[RESULT] 10", None),
        ("[RESULT] -1", None),
        ("[RESULT] 3.5", None),
        ("[RESULT] four", None),
        ("[RESULT] 4-5", None),
        ("[RESULT] 2–3", None),
        ("[RESULT] 3 or 4", None),
        ("[RESULT] 4,5", None),
        ("[RESULT] 4/10", None),
        ("[RESULT] 4 out of 10", None),
        ("The form is [RESULT] 1-5. I give four.", None),
        ("Feedback: fine. [RESULT] 4 out of 5.", 4),
        ("Score: 4", None),
        ("The response deserves 4 of 5.", None),
        ("", None),
    ],
)
def test_verdicts(text, score):
    assert parse_verdict(text) == score
