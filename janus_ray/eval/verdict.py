"""Reading a judge's answer: `Feedback: ... [RESULT] n`.

What a judge writes holds more than its verdict: thoughts before it, the form quoted before it is used, scores that the
response claims for itself, and, behind it, the next request that a small judge makes up together with its answer.

    thoughts           are cut away; one that never ends takes the rest with it
    what comes behind  is cut away where it visibly begins anew: "### Request", an end-of-turn token
    mentions           do not count: quoted, announced ("it says [RESULT] 5"), called unfit ("[RESULT] 5 would")
    the rest           is the verdict when all of it says the same and at least once ends its line

Everything else has no verdict, and the judge is asked for one. A score is never moved to the nearest allowed one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace

_THOUGHT = r"(?:antml:|seed:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)"
# <think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>, ◁think▷, and the channels of gpt-oss.
_THOUGHT_MARK = re.compile(
    rf"(?P<open><\s?{_THOUGHT}(?:\s[^<>\n]{{0,80}})?>|\[THINK\]|<\|(?:begin_of_thought|start_thinking|think)\|>|◁think▷"
    r"|<\|channel\|>\s*analysis\s*<\|message\|>)"
    rf"|(?P<close><\s?/\s?{_THOUGHT}\s?>|\[/THINK\]|<\|(?:end_of_thought|end_thinking|/think)\|>|◁/think▷"
    r"|<\|channel\|>\s*final\s*<\|message\|>)",
    flags=re.IGNORECASE,
)

# Characters that look like others or like nothing.
_PLAIN = str.maketrans(
    "［］【】（）：／０１２３４５６７８９", "[][]():/0123456789", "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
)

# "<" opens "<3>" and is "fewer than" otherwise.
_MARKS = r"(?:[\s:=*_(\[{`\"'$\\#]|<(?=[^<>\n]{1,12}>))*"
_LABEL = r"(?:(?:the\s+)?(?:(?:final|overall)\s+)?(?:score|rating|grade)(?:\s+(?:is|of))?" + _MARKS + ")?"
_NUMBER = r"[+\-−–]?\s?[0-9]+(?:[.,][0-9]+)*"
# What joins a second number to the first: a scale or a range, which may go on in the next line.
_JOINED = (
    r"(?:[*_)\]}`]{0,4}(?:\s*(?:[-−–—~/,+&]|\b(?:or|to|and|out\s+of|of)\b)\s*[*_(\[`]{0,4}"
    r"[0-9]+(?:[.,][0-9]+)*|\s+[0-9]+(?=\s*(?:\n|$))))*"
)
# The form that the judge prompt asks for and what judges make of it: [RESULT]: 4, **[RESULT]** (4), [RESULT] Score: 4.
_TAG = re.compile(r"\\?\[(?:\[\s*RESULT\s*\]\]|\s*RESULT\s*[:=]?\s*(?:\\?\]|(?=\d+\s*\])))", flags=re.IGNORECASE)
_SCORE = re.compile(_MARKS + _LABEL + r"(?:boxed\s*\{\s*)?" + rf"(?P<number>{_NUMBER}{_JOINED})", flags=re.IGNORECASE)
_WORD = re.compile(r"[\s:*_]*(?P<number>[^\W\d_]\w*)")
_READABLE = re.compile(r"(?P<score>[1-5])(?:\.0+)?(?:(?:/|outof|of)5(?:\.0+)?)?", flags=re.IGNORECASE)
_SCALE_ITSELF = re.compile(r"1(?:[-–—]|to)5", flags=re.IGNORECASE)
_CLOSING = re.compile(
    r"[^\S\n]*(?:(?:points?|stars?)\b|分|点|점)?"
    r"[*_)\]}>`\"'”’»›」』$\\.。．!！ ]{0,8}(?:\[/RESULT\])?[*.。 ]{0,4}",
    flags=re.IGNORECASE,
)

_TOKEN = r"(?:</?s>|<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?(?:eos|bos|end_of_turn|start_of_turn)>|\[/?INST\])"
_TOKENS = re.compile(rf"(?:[^\S\n]*{_TOKEN})*[^\S\n]*", flags=re.IGNORECASE)
_PARTS = (
    r"(?:request|response|reference(?:\s+answer)?|criterion|task|instruction|example|input|question|prompt|user|human"
    r"|assistant|judge|system)"
)
# What starts over for sure, and what does behind a verdict of an answer that has the asked form from its first word on.
_BEGINS_ANEW = re.compile(rf"\s*(?:{_TOKEN}|\#+\s*(?:\w+\s+)?{_PARTS}\b)", flags=re.IGNORECASE)
_SEEMS_TO_BEGIN_ANEW = re.compile(
    rf"\s*(?:[-*=]{{3,}}\s*(?:\n|$)|[*#]*\s*(?:\w+\s+)?{_PARTS}\s*\d*\s*\**\s*:|[*#]*\s*\bfeedback\b[\s\d*]*(?::|\n))",
    flags=re.IGNORECASE,
)
_HAS_THE_FORM = re.compile(r"[\s*#_]*(?:feedback\b|\\?\[\s*result)", flags=re.IGNORECASE)
_FEEDBACK = re.compile(r"\bfeedback\b(?:[\s\d*]*:|[^\S\n]*\n)", flags=re.IGNORECASE)
_PART_OF_THE_PROMPT = re.compile(r"#[^\S\n]{0,4}(?:request|response|reference answer|criterion)\b", flags=re.IGNORECASE)

_ENDS_A_SENTENCE = re.compile(r"(?:^|[.!?。！？…][\"'”’)*_`]*)[\s*_#\"'`“]*$")
_OPENING_QUOTES, _CLOSING_QUOTES = "\"'`“‘«»„‹「『", "\"'`”’»›」』"
# As far as a place's surroundings are looked at, in characters.
_CONTEXT = 120
# Before a score that somebody else wrote, or that shows the form; before one that may be the judge's own.
_ANNOUNCED = re.compile(
    r"\b(?:sa(?:ys?|id|ying)|claim(?:s|ed|ing)?|contain(?:s|ed|ing)?|includ(?:es?|ed|ing)|writ(?:es?|ten|ing)|wrote"
    r"|stat(?:es?|ed|ing)|reads?|reading|plant(?:s|ed|ing)?|add(?:s|ed|ing)?|append(?:s|ed|ing)?|print(?:s|ed|ing)?"
    r"|output(?:s|ted)?|quot(?:es?|ed|ing)|demand(?:s|ed)?|insert(?:s|ed)?|asks?(?:\s+for)?|request(?:s|ed)"
    r"|(?:end(?:s|ed|ing)?|begin(?:s|ning)?|start(?:s|ed|ing)?|clos(?:es?|ed|ing)|finish(?:es|ed|ing)?)\s+(?:with|in|on)"
    r"|form|format|text|string|phrase|words?|line|tag|token|marker|example|like|e\.g\.|such\s+as)"
    r"(?:\s+(?:of|itself|the|a|an|its|own|score|for|was|is))*\s*[:,(]?[\s*_]*$",
    flags=re.IGNORECASE,
)
_INSIDE = re.compile(r"\b(?:as|with|of|the|a|an|to|is|be|by|in|for|give|use|than|or|and|if)\s+$", flags=re.IGNORECASE)
_A_REASON = re.compile(r"(?:because|since|as|due|given|for)\b", flags=re.IGNORECASE)
_GOES_ON = re.compile(r"\w|\.\.|…")
_UNFIT = re.compile(r"(?:would|could|might|may|should|is|was|means|if|when|only)\b", flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Place:
    """One place where the tag stands, with what follows it."""

    number: str
    """As written, without blanks and marks; a word where no number stands."""
    start: int
    end: int
    """Where the score and its closing marks end."""
    ends_line: bool
    begins_sentence: bool
    is_mention: bool

    @property
    def score(self) -> int | None:
        """From 1 to 5, or None."""
        readable = _READABLE.fullmatch(self.number)
        return int(readable["score"]) if readable else None


class _Answer:
    """A judge's answer without its thoughts, and where its parts begin."""

    def __init__(self, text: str) -> None:
        self.text = _without_thoughts(text).translate(_PLAIN)
        self.feedback = [found.start() for found in _FEEDBACK.finditer(self.text)]
        self.prompt_parts = [found.start() for found in _PART_OF_THE_PROMPT.finditer(self.text)]
        self.fences = [found.start() for found in re.finditer("```", self.text)]

    def last(self, starts: list[int], before: int) -> int | None:
        """The last of the starts before a position."""
        index = bisect_left(starts, before)
        return starts[index - 1] if index else None


def parse_verdict(text: str) -> int | None:
    """The score from 1 to 5; None when there is no readable one, or more than one reading."""
    answer = _Answer(text)
    places = [place for tag in _TAG.finditer(answer.text) if (place := _place(answer, tag)) is not None]
    own = [place for place in _before_it_begins_anew(answer, places) if not place.is_mention]
    scores = {place.score for place in own}
    return scores.pop() if len(scores) == 1 and any(place.ends_line for place in own) else None


def _without_thoughts(text: str) -> str:
    """The text without its thoughts; what precedes a mark that only closes one was a thought, too."""
    kept: list[str] = []
    start, thinks = 0, False
    for mark in _THOUGHT_MARK.finditer(text):
        if mark["close"]:
            if not thinks:
                kept.clear()
            start, thinks = mark.end(), False
        elif not thinks:
            kept.append(text[start : mark.start()])
            thinks = True
    return "".join(kept) + ("" if thinks else text[start:])


def _place(answer: _Answer, tag: re.Match[str]) -> _Place | None:
    """What stands at a tag; None where that is no attempt at a score: the bare tag, or the form's own placeholder."""
    text = answer.text
    before = text[max(0, tag.start() - _CONTEXT) : tag.start()]
    begins_sentence = bool(_ENDS_A_SENTENCE.search(before)) and (bool(before.strip()) or tag.start() <= _CONTEXT)
    found = _SCORE.match(text, tag.end())
    if found is None and begins_sentence:
        found = _WORD.match(text, tag.end())
    if found is None:
        return None
    opened = any(mark in _OPENING_QUOTES for mark in text[tag.end() : found.start("number")])
    number = re.sub(r"[\s*_()\[\]{}`]", "", found["number"])
    if _SCALE_ITSELF.fullmatch(number):
        return None
    closing = _CLOSING.match(text, found.end())
    assert closing is not None
    tokens = _TOKENS.match(text, closing.end())
    assert tokens is not None
    ends_line = text[tokens.end() : tokens.end() + 1] in ("", "\n")
    place = _Place(number, tag.start(), closing.end(), ends_line, begins_sentence, is_mention=False)
    is_mention = (
        _is_quoted(answer, place, "" if opened else closing.group())
        or _is_spoken_of(answer, place, before, closing.group())
        or _is_echo(answer, place)
    )
    return replace(place, is_mention=is_mention)


def _is_quoted(answer: _Answer, place: _Place, closing: str) -> bool:
    """Whether a score stands in quotation marks, a block quotation or a code block that something else surrounds."""
    text = answer.text
    line_before = text[text.rfind("\n", 0, place.start) + 1 : place.start].rstrip("*_ ")
    if line_before.lstrip().startswith(">"):
        return True
    if bisect_left(answer.fences, place.start) % 2 == 1 and text[: answer.fences[0]].strip():
        return True
    alone = place.ends_line and place.begins_sentence and not line_before.strip(_OPENING_QUOTES)
    whole = text.lstrip()[:1] in _OPENING_QUOTES and not text[place.end :].strip()
    opens, closes = line_before.endswith(tuple(_OPENING_QUOTES)), any(mark in _CLOSING_QUOTES for mark in closing)
    return (opens and not alone) or (closes and not alone and not whole)


def _is_spoken_of(answer: _Answer, place: _Place, before: str, closing: str) -> bool:
    """Whether the sentence around a score only speaks of it."""
    after = "" if place.ends_line else answer.text[place.end : place.end + _CONTEXT].lstrip()
    if place.begins_sentence:
        return bool(_UNFIT.match(after))
    if _ANNOUNCED.search(before):
        return True
    goes_on = bool(_GOES_ON.match(after)) and not _A_REASON.match(after) and not set(closing) & set(".。!！")
    return goes_on and bool(_INSIDE.search(before))


def _is_echo(answer: _Answer, place: _Place) -> bool:
    """Whether a score stands in a part of the prompt that the judge repeats, before its own feedback begins."""
    part = answer.last(answer.prompt_parts, place.start)
    return part is not None and (answer.last(answer.feedback, place.start) or -1) < part


def _before_it_begins_anew(answer: _Answer, places: list[_Place]) -> list[_Place]:
    """The places up to the first verdict behind which the judge starts over; all where it does not."""
    has_form = _HAS_THE_FORM.match(answer.text) is not None
    for index, place in enumerate(places):
        has_feedback = answer.last(answer.feedback, place.start) is not None
        if place.is_mention or not (place.begins_sentence or has_feedback):
            continue
        end = place.end
        if place.score is None and not place.ends_line:
            newline = answer.text.find("\n", end)
            end = len(answer.text) if newline < 0 else newline
        if _BEGINS_ANEW.match(answer.text, end) or (has_form and _SEEMS_TO_BEGIN_ANEW.match(answer.text, end)):
            return [*places[:index], replace(place, ends_line=True)]
    return places
