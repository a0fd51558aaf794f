"""Thoughts that a model writes into its answer, told apart from the answer.

Servers without a reasoning parser send what the model wrote as it is: `<think>…</think>` and the like before the
answer, only the closing tag where the chat template has opened the thought already, and no closing tag where the
answer was cut. What follows from each is decided here; an answer that cannot be told apart is not guessed at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Tags that nobody writes except around thoughts count anywhere in the text. Between backticks they are words of the
# answer (put it into a `<think>` tag).
_ALWAYS = r"<(?P<c1>/?)\s*(?i:think|thinking|seed:think)\s*>|\[(?P<c2>/?)THINK\]|◁(?P<c3>/?)think▷"
_QWQ = r"<\|(?P<c4>begin|end)_of_thought\|>"
_TAG = re.compile(rf"(?P<before>`?)(?:{_ALWAYS}|{_QWQ})(?P<behind>`?)")
# These are also asked for as parts of an answer ("reply in XML with <reasoning>"): only around the start of the text.
_LEADING = re.compile(r"\s*<(?P<name>thoughts?|reasoning)>.*?(?P<end></(?P=name)>|\Z)", flags=re.DOTALL | re.IGNORECASE)
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
        return _balanced(text, tags) or _unbalanced(text, tags)
    leading = _LEADING.match(text)
    if leading:
        return Told(text[leading.end() :], "closed") if leading["end"] else Told("", "open")
    return Told(text, "none")


def _closes(match: re.Match[str]) -> bool:
    return match["c4"] == "end" or "/" in (match["c1"], match["c2"], match["c3"])


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
