"""Conversations of several turns, as OpenAI's fine-tuning files hold them: a list of messages with role and content."""

from __future__ import annotations

import math
from typing import Any

from janus_ray.chat import Message
from janus_ray.errors import DataError
from janus_ray.text import is_blank, one_line

# Why a row is left out: the count's name, and its words behind a number.
REASONS = {
    "rows_not_ok": "whose status is not ok",
    "rows_without_prompt": "without prompt",
    "rows_without_output": "without output",
    "rows_out_of_turn": "whose turns do not alternate",
    "rows_with_other_roles": "with roles other than system, user and assistant",
    "rows_with_tool_calls": "with tool calls",
    "rows_with_other_parts": "with parts that are no text",
    "rows_with_weights": "with turns of another weight than 1",
}
_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant")
_TOOL_ROLES = ("tool", "function")
_TOOL_CALLS = ("tool_calls", "function_call")


def read_messages(value: Any, place: str) -> list[Message] | str:
    """The conversation that a row's messages are, or why there is none to train on.

    System and developer messages before the first turn become one, with a blank line between them, as a server of ours
    merges them; blank ones count for nothing. Keys that are not named here carry no text and are not looked at.

    Args:
        value: what the row holds; not nothing (see `is_nothing`).
        place: the row, for messages.

    Returns:
        At most one system message, then user and assistant in turns, user first and assistant last; or a key of
        `REASONS`.

    Raises:
        DataError: it is no list of messages, or a role or a content is of a type that neither can have.
    """
    if not isinstance(value, list):
        raise DataError(f"{place}: messages is {kind(value)}, expected a list of messages")
    turns: list[Message] = []
    reasons: list[str] = []
    for index, message in enumerate(value):
        turn, reason = _turn(message, f"{place}: messages[{index}]")
        turns.append(turn)
        reasons += [reason] if reason else []
    return reasons[0] if reasons else _in_turn(turns)


def is_null(value: Any) -> bool:
    """Whether a cell is null, or NaN, which is how pandas writes a missing text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_nothing(value: Any) -> bool:
    """Whether a cell is null, blank, without an element, or an object of nothing but such."""
    if isinstance(value, dict):
        return all(map(is_nothing, value.values()))
    if isinstance(value, str):
        return is_blank(value)
    return value == [] or is_null(value)


def kind(value: Any) -> str:
    """The type of a cell, for a person."""
    for types, name in (
        (str, "text"),
        (bool, "true or false"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    ):
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


def _turn(message: Any, path: str) -> tuple[Message, str | None]:
    """One message as role and text, and why a row that holds it is left out."""
    if not isinstance(message, dict):
        raise DataError(f"{path} is {kind(message)}, expected an object with role and content")
    role = message.get("role")
    if is_nothing(role):
        shown = one_line(", ".join(map(str, message)), 60)
        raise DataError(f"{path} has no role, expected role and content; it has: {shown or 'nothing'}")
    if not isinstance(role, str):
        raise DataError(f"{path}.role is {kind(role)}, expected text")
    text, is_text = _text(message.get("content"), f"{path}.content")
    reason = None
    if role in _TOOL_ROLES or not all(is_nothing(message.get(name)) for name in _TOOL_CALLS):
        reason = "rows_with_tool_calls"
    elif role not in _ROLES:
        reason = "rows_with_other_roles"
    elif not is_text or not is_nothing(message.get("audio")):
        reason = "rows_with_other_parts"
    # OpenAI's files switch a turn's loss off with a weight of 0.
    elif role == "assistant" and not is_nothing(message.get("weight")) and message["weight"] != 1:
        reason = "rows_with_weights"
    return {"role": "system" if role in _SYSTEM else role, "content": text}, reason


def _text(content: Any, path: str) -> tuple[str, bool]:
    """A content's text, "" where there is none, and whether it is text and nothing else."""
    if isinstance(content, str):
        return content, True
    if is_nothing(content):
        return "", True
    if not isinstance(content, list):
        raise DataError(f"{path} is {kind(content)}, expected text or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        type_ = part.get("type") if isinstance(part, dict) else None
        if not isinstance(type_, str):
            odd = kind(part) if not isinstance(part, dict) else "an object without type"
            raise DataError(f"{path}[{index}] is {odd}, expected a text part")
        if type_ != "text":
            return "", False
        text = part.get("text")
        if not isinstance(text, str) and not is_nothing(text):
            raise DataError(f"{path}[{index}].text is {kind(text)}, expected text")
        texts.append(text if isinstance(text, str) else "")
    return "".join(texts), True


def _in_turn(messages: list[Message]) -> list[Message] | str:
    """The messages with their system messages merged, or why they are no conversation to train on."""
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    systems = [message["content"] for message in messages[:first] if not is_blank(message["content"])]
    turns = messages[first:]
    if any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        return "rows_out_of_turn"
    if not turns or any(is_blank(turn["content"]) for turn in turns[::2]):
        return "rows_without_prompt"
    if len(turns) % 2 or any(is_blank(turn["content"]) for turn in turns[1::2]):
        return "rows_without_output"
    return [{"role": "system", "content": "\n\n".join(systems)}, *turns] if systems else turns
