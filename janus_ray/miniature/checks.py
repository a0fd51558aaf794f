"""What a judge looks for in a response: evidence for a value, found by cues and structure, never by comparison.

Independent of gold.py by design: nothing here reads the teacher's texts. The cues stand in checks.toml.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Literal

from janus_ray.miniature.world import Topic, topics

Evidence = Literal["none", "partial", "full"]
Fit = Literal["off_topic", "named", "fitting"]

_CLAIMED_COUNT = {
    "one_tip": (1, r"\b(one|single)\b"),
    "two_tips": (2, r"\b(two|pair)\b"),
    "three_tips": (3, r"\bthree\b"),
}
_LAYOUT_LINE = {"bullets": r"^\s*[-*•] \S", "numbered": r"^\s*\d+[.)] \S"}


def evidence(dimension: str, name: str, request: str, response: str) -> Evidence:
    """How clearly a response shows a value.

    Raises:
        KeyError: this world has no such value.
    """
    if name in _CLAIMED_COUNT:
        return _count_evidence(name, request, response)
    # What the topic's own advice happens to say ("rest every third day") is no evidence of a person's value.
    response = _without_tips(request, response)
    if name in _LAYOUT_LINE:
        return _layout_evidence(name, response)
    if name == "dialogue":
        found = [bool(re.search(rf"\b{letter}:", response)) for letter in ("Q", "A")]
        return _grade(sum(found), len(found))
    groups = _cues()[dimension][name]
    return _grade(sum(bool(group.search(response)) for group in groups), len(groups))


def topic_fit(request: str, response: str) -> Fit:
    """Whether a response is about the request: it names the topic, and its advice belongs to it."""
    topic = _known_topic(request)
    if topic is None:
        words = set(re.findall(r"[a-z]{5,}", request.lower()))
        return "fitting" if words & set(re.findall(r"[a-z]{5,}", response.lower())) else "off_topic"
    if not re.search(rf"\b{topic.name}\b", response, flags=re.IGNORECASE):
        return "off_topic"
    return "fitting" if _tips_present(topic, response) else "named"


def score(dimension: str, name: str, request: str, response: str) -> int:
    """The rubric's score from 1 to 5 (see bench.SCORE_DESCRIPTIONS for the anchors)."""
    shown = evidence(dimension, name, request, response)
    if shown == "none":
        return 1
    fit = topic_fit(request, response)
    if shown == "partial":
        return 2 if fit == "off_topic" else 3
    return {"off_topic": 3, "named": 4, "fitting": 5}[fit]


def _grade(found: int, wanted: int) -> Evidence:
    if found == wanted:
        return "full"
    return "partial" if found else "none"


def _count_evidence(name: str, request: str, response: str) -> Evidence:
    """A number of tips must be announced and kept."""
    count, claim = _CLAIMED_COUNT[name]
    if not re.search(claim, _without_tips(request, response), flags=re.IGNORECASE):
        return "none"
    topic = _known_topic(request)
    given = _tips_present(topic, response) if topic else 1 + len(re.findall(r", then |\n", response.strip()))
    return "full" if given == count else "partial"


def _layout_evidence(name: str, response: str) -> Evidence:
    """List lines of the wanted kind, and none of the other kind."""
    hits = {kind: len(re.findall(line, response, flags=re.MULTILINE)) for kind, line in _LAYOUT_LINE.items()}
    if not hits[name]:
        return "none"
    return "full" if sum(hits.values()) == hits[name] else "partial"


def _known_topic(request: str) -> Topic | None:
    words = re.findall(r"[a-z]+", request.lower())
    return next((topics()[word] for word in words if word in topics()), None)


def _tips_present(topic: Topic, response: str) -> int:
    return sum(tip.lower() in response.lower() for tip in topic.tips)


def _without_tips(request: str, response: str) -> str:
    """The response with each of the topic's tips replaced by a word that stands for nothing."""
    topic = _known_topic(request)
    for tip in topic.tips if topic else ():
        response = re.sub(re.escape(tip), "tip", response, flags=re.IGNORECASE)
    return response


@cache
def _cues() -> dict[str, dict[str, list[re.Pattern[str]]]]:
    raw = tomllib.loads((Path(__file__).parent / "checks.toml").read_text())
    return {
        dimension: {
            name: [re.compile(group, flags=re.IGNORECASE | re.DOTALL) for group in groups]
            for name, groups in names.items()
        }
        for dimension, names in raw.items()
    }
