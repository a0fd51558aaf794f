"""What the engine refuses, in our words: plain values, so that nothing of the engine's crosses to the gateway.

The engine words its refusals for the people who run it. What callers meet is said here again; everything else is cut to
its first sentence without names of classes, and what went wrong inside the engine stays in its log.
"""

from __future__ import annotations

import re
from typing import Any

_MAX_CHARACTERS = 300
_DEAD = re.compile(r"EngineCore encountered an issue")
_TOO_LONG = re.compile(r"(?:maximum|model's maximum)\s+(?:context|model) length|longer than the maximum")
_LIMIT = re.compile(r"(?:context|model) length (?:is|of) (\d+)|context length \((\d+)\)")
_GIVEN = re.compile(r"contains (at least )?(\d+) (\w+)|\(length (\d+)\)|Input length \((\d+)\)")
_ASKED = re.compile(r"requested (\d+) output tokens")
_NO_TOKENS = re.compile(r"out-of-vocab|out of vocab", re.IGNORECASE)
_INVALID = re.compile(r"\d+ validation errors? for ")
# One entry of a pydantic error: the field's path in a line of its own, if it is about one, and below it what is wrong.
_ENTRY = re.compile(r"^(?:(\S+)\n)?\s+(.+?) \[type=", re.MULTILINE)
_GRAMMAR = re.compile(r"grammar|json ?schema|regex|structured|compile", re.IGNORECASE)


def refusal(message: str, code: int, param: str | None = None) -> dict[str, Any]:
    """One error item for the gateway.

    Args:
        message: what the engine says.
        code: the HTTP status that it chose.
        param: the field that it names, if it does.
    """
    if _DEAD.match(message):
        code = 503
    if code >= 500:
        return {"error": {"message": "the engine failed on this request", "code": code, "param": None}}
    message, param = in_our_words(message, param)
    return {"error": {"message": message, "code": code, "param": param}}


def in_our_words(message: str, param: str | None = None) -> tuple[str, str | None]:
    """The engine's reason as one sentence of ours, and the request's field that it is about."""
    if _TOO_LONG.search(message):
        return _too_long(message), "messages"
    if _INVALID.match(message) and (entries := _ENTRY.findall(message)):
        # Of the alternatives that a field has, the last is the list.
        path, problem = entries[-1]
        return in_our_words(_first_sentence(problem), path.partition(".")[0] or param)
    line = _first_sentence(message)
    if _NO_TOKENS.search(message) and "logit_bias" in message:
        size = re.search(r"[Vv]ocab\w* size:? (\d+)", message)
        return f"logit_bias: a token id is not in the vocabulary{f' of {size[1]}' if size else ''}", "logit_bias"
    if "greedy sampling" in message:
        return "n: at temperature 0 all answers are the same; ask for 1", "n"
    if param is None and _GRAMMAR.search(message):
        return f"response_format: this schema cannot be followed: {line}", "response_format"
    return (f"{param}: {line}" if param and param not in line else line), param


def _too_long(message: str) -> str:
    limit, given, asked = _LIMIT.search(message), _GIVEN.search(message), _ASKED.search(message)
    has = f"it has {given[1] or ''}{given[2] or given[4] or given[5]} {_unit(given[3])}" if given else ""
    more = f"{asked[1]} more tokens are asked for" if asked and asked[1] != "0" else ""
    takes = f"this model takes {limit[1] or limit[2]} tokens, answer included" if limit else ""
    return "the prompt is too long: " + ", ".join(part for part in (has, more, takes) if part)


def _unit(word: str | None) -> str:
    return "characters" if word == "characters" else "tokens"


def _first_sentence(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines and _INVALID.match(lines[0]):
        lines = []
    if lines and lines[0].endswith("regex parse error:"):
        # A drawing of the place follows, and then the reason.
        lines = [f"{lines[0]} {lines[-1].removeprefix('error: ')}"]
    line = re.sub(r"\s*\(parameter=.*\)$", "", lines[0]) if lines else "the request was refused"
    line = re.sub(r"^(?:Value error, |(?:\w+\.)*\w*(?:Error|Exception|Grammar error): )", "", line)
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}…"
