"""Thoughts that a model writes into its answer, told apart from the answer.

Servers without a reasoning parser send what the model wrote as it is: `<think>…</think>` and the like before the
answer, only the closing tag where the chat template has opened the thought already, and no closing tag where the
answer was cut. What follows from each is decided here; an answer that cannot be told apart is not guessed at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

# Tags that nobody writes except around thoughts count anywhere in the text. Between backticks they are words of the
# answer (put it into a `<think>` tag).
_ALWAYS = (
    r"<(?P<c1>/?)\s*(?i:(?:[a-z]{1,20}[:_])?think(?:ing)?)(?:\s[^<>\n]{0,80})?>|\[(?P<c2>/?)THINK\]|◁(?P<c3>/?)think▷"
)
# QwQ and its kin, Cohere, and others.
_IN_BARS = r"<\|(?i:(?P<c4>begin|start|end)_(?:of_)?(?:thought|thinking)|(?P<c5>/?)think(?:ing)?)\|>"
_TAG = re.compile(rf"(?P<before>`?)(?:{_ALWAYS}|{_IN_BARS})(?P<behind>`?)")
# What those servers put around the answer that follows.
_AROUND_THE_ANSWER = re.compile(
    r"\A\s*<\|(?:begin_of_solution|start_response)\|>|<\|(?:end_of_solution|end_response)\|>\s*\Z", flags=re.IGNORECASE
)
# These are also asked for as parts of an answer ("reply in XML with <reasoning>"): only around the start of the text.
_NAMES = r"(?P<name>thoughts?|reasoning|reflection|scratchpad|inner_monologue)"
_LEADING = re.compile(rf"\s*<{_NAMES}>.*?(?P<end></(?P=name)>|\Z)", flags=re.DOTALL | re.IGNORECASE)
# One that is closed but was never opened was opened by the chat template.
_CLOSED = re.compile(rf"(?<!`)</{_NAMES}>(?!`)", flags=re.IGNORECASE)
# gpt-oss without its parser: channels, of which "final" is the answer.
_CHANNEL, _FINAL = "<|channel|>", "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class Told:
    """What a person should see of a text, and what there was of thoughts."""

    text: str
    thoughts: Literal["none", "closed", "open", "unclear"]
    """open: a thought never ends, `text` is what stands before it; unclear: the tags contradict each other."""


def without_thoughts(text: str) -> Told:
    """Leaves out what the model thought."""
    if _CHANNEL in text:
        _, final, rest = text.rpartition(_FINAL)
        return Told(rest.split("<|")[0], "closed") if final else Told("", "open")
    tags = [
        (match.end("before"), match.start("behind"), _closes(match))
        for match in _TAG.finditer(text)
        if not (match["before"] and match["behind"])
    ]
    if tags:
        told = _balanced(text, tags) or _unbalanced(text, tags)
        return replace(told, text=_AROUND_THE_ANSWER.sub("", told.text))
    leading = _LEADING.match(text)
    if leading:
        return Told(text[leading.end() :], "closed") if leading["end"] else Told("", "open")
    closed = _CLOSED.search(text)
    if closed and f"<{closed['name']}".lower() not in text.lower():
        return Told(text[closed.end() :], "closed")
    return Told(text, "none")


def _closes(match: re.Match[str]) -> bool:
    return (match["c4"] or "").lower() == "end" or "/" in (match["c1"], match["c2"], match["c3"], match["c5"])


def _balanced(text: str, tags: list[tuple[int, int, bool]]) -> Told | None:
    """The text without its blocks, where each opening tag has its closing one, nested or not."""
    kept, depth, position = [], 0, 0
    for start, end, closes in tags:
        if depth == 0 and not closes:
            kept.append(text[position:start])
        depth += -1 if closes else 1
        if depth < 0:
            return None
        position = end
    return Told("".join(kept) + text[position:], "closed") if depth == 0 else None


def _unbalanced(text: str, tags: list[tuple[int, int, bool]]) -> Told:
    """Tags that do not pair up: the first closing one ends a thought that the template had opened."""
    kept, inside, ended, position = [], False, False, 0
    for start, end, closes in tags:
        if not closes and not inside:
            kept.append(text[position:start])
            inside = True
        elif closes and inside:
            inside, ended, position = False, True, end
        elif closes and not ended:
            kept, ended, position = [], True, end
        elif closes:
            # A second end of one thought: it or the first is a word of the thought, or of the answer.
            return Told("", "unclear")
        # An opening tag inside a thought is a word of the thought.
    return Told("".join(kept), "open") if inside else Told("".join([*kept, text[position:]]), "closed")
