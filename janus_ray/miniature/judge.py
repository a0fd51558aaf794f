"""The judge: reads the judge prompt that any judge would be sent, applies checks.py, answers in the asked form."""

from __future__ import annotations

import re

from janus_ray.miniature import checks

_PROMPT = re.compile(
    r"### Request\n(?P<request>.*?)\n+### Response\n(?P<response>.*?)\n+(?:### Reference answer \(score 5\)\n.*)?"
    r"### Criterion\n(?P<criterion>.*?)\n+(?:Score 1:|### Task)",
    flags=re.DOTALL,
)
# Rubrics of this world name the value they are about: see bench.rubric_for.
_NAMED_VALUE = re.compile(r"\((?P<dimension>\w+) / (?P<subdimension>\w+) / (?P<name>\w+)\)")


def verdict(prompt: str) -> str:
    """Feedback and score for a judge prompt; a prompt it cannot read gets a refusal without a score."""
    parts = _PROMPT.search(prompt)
    named = _NAMED_VALUE.search(parts["criterion"]) if parts else None
    if not parts or not named:
        return "I cannot find a request, a response and a criterion of this world in the prompt."
    request, response = parts["request"].strip(), parts["response"].strip()
    dimension, name = named["dimension"], named["name"]
    try:
        shown = checks.evidence(dimension, name, request, response)
        score = checks.score(dimension, name, request, response)
    except KeyError:
        return f"This world has no value {dimension} / {name}."
    fit = checks.topic_fit(request, response).replace("_", " ")
    return f"Feedback: Evidence of “{name.replace('_', ' ')}” is {shown}; the advice is {fit}. [RESULT] {score}"
