"""Reading a judge's answer: `Feedback: ... [RESULT] n`, the last verdict counts."""

from __future__ import annotations

import re

# The form that the judge prompt asks for, and what judges make of it: [RESULT]: 4, [RESULT] **4**, [RESULT] (4), 4/5.
_VERDICT = re.compile(
    r"\[RESULT\]\s*:?\s*[*(\[`\"']*\s*(?P<score>-?\d+(?:\.\d+)?)(?P<rest>[^\n]*)", flags=re.IGNORECASE
)
# What may follow the score on its line: closing marks, the scale, a full stop.
_HARMLESS_REST = re.compile(r"(\s*/\s*5|\s+out of 5)?[\s*)\]`\"'.]*", flags=re.IGNORECASE)


def parse_verdict(text: str) -> int | None:
    """The score from 1 to 5, or None when there is no readable one.

    The last verdict wins, because judges quote the form before they use it. A score out of range or between two
    integers is unreadable: it is not moved to the nearest allowed one.
    """
    found = list(_VERDICT.finditer(text))
    if not found:
        return None
    score = float(found[-1]["score"])
    readable = score in (1, 2, 3, 4, 5) and _HARMLESS_REST.fullmatch(found[-1]["rest"])
    return int(score) if readable else None
