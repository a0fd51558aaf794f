"""The messages of a chat request: from what clients send to a system message and turns of text.

Clients send back what they were given. The official SDK's `model_dump()` of an answer has every field of OpenAI's, most
of them null, so a field that is null counts as absent. What carries meaning that a model behind this server would not
get (tool calls, audio, images) is refused by name.
"""

from __future__ import annotations

from typing import Any

from janus_ray.serve.refusals import wrong_field
from janus_ray.text import is_blank

_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant")
# What a turn may bring along without any part in its text. `parsed` is the SDK's own copy of the text; thoughts of
# earlier turns are not given to a model again.
_BESIDE_THE_TEXT = (
    "name",
    "annotations",
    "parsed",
    "reasoning",
    "reasoning_content",
    # As above under the names that other clients and endpoints have for it.
    "reasoning_details",
    "thinking_blocks",
    "provider_specific_fields",
)
_MEANINGFUL = ("tool_calls", "function_call", "audio", "tool_call_id")


def system_and_turns(messages: Any) -> tuple[str, list[dict[str, str]]]:
    """The system message, "" where there is none, and the turns that follow it, user first and last.

    Several system or developer messages before the first turn become one, with a blank line between them. A blank one
    counts as none, as in training.

    Raises:
        ApiError: 400 with the path of the field.
    """
    if not isinstance(messages, list):
        raise wrong_field("messages", "must be a list of messages", "list_type")
    if not messages:
        raise wrong_field("messages", "must hold at least 1 message", "too_short")
    pairs = [_role_and_text(message, f"messages.{index}") for index, message in enumerate(messages)]
    first = next((index for index, (role, _) in enumerate(pairs) if role not in _SYSTEM), len(pairs))
    turns = [{"role": role, "content": text} for role, text in pairs[first:]]
    for index, turn in enumerate(turns):
        due = ("user", "assistant")[index % 2]
        if turn["role"] != due:
            raise wrong_field(f"messages.{first + index}.role", f"{turn['role']!r} where {due!r} is due", "role_order")
    if len(turns) % 2 == 0:
        raise wrong_field("messages", "the last message must be the user's", "role_order")
    return "\n\n".join(text for _, text in pairs[:first] if not is_blank(text)), turns


def _role_and_text(message: Any, path: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise wrong_field(path, "must be an object with role and content", "dict_type")
    given = {name: value for name, value in message.items() if value is not None}
    if "role" not in given:
        raise wrong_field(f"{path}.role", "is required", "missing")
    role = given["role"]
    if role not in _ROLES:
        shown = repr(role) if isinstance(role, str) and len(role) <= 40 else "this"
        allowed = ", ".join(repr(one) for one in _ROLES)
        raise wrong_field(f"{path}.role", f"{shown} is not one of {allowed}", "literal_error")
    for name, value in given.items():
        known = name in ("role", "content", "refusal") or name in _BESIDE_THE_TEXT
        # The SDK gives an answer without tool calls as null or as an empty list.
        if name in _MEANINGFUL and value != []:
            raise wrong_field(f"{path}.{name}", "is not supported here; messages are text", "unsupported")
        if not known and name not in _MEANINGFUL:
            raise wrong_field(f"{path}.{name}", "unknown parameter", "extra_forbidden")
    return role, _text(role, given, path)


def _text(role: str, given: dict[str, Any], path: str) -> str:
    """A message's text; that of a refusal where an assistant's turn was one."""
    refusal = given.get("refusal")
    if refusal is not None and not isinstance(refusal, str):
        raise wrong_field(f"{path}.refusal", "must be a text", "string_type")
    content = given.get("content")
    if content is None and role == "assistant":
        return refusal or ""
    if content is None:
        raise wrong_field(f"{path}.content", "is required", "missing")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_field(f"{path}.content", "must be a text or a list of text parts", "string_type")
    return "".join(_part(part, role, f"{path}.content.{index}") for index, part in enumerate(content))


def _part(part: Any, role: str, path: str) -> str:
    """The text of one part; whatever else stands in it (cache marks, annotations) is not text."""
    kind = part.get("type") if isinstance(part, dict) else None
    name = {"text": "text", "refusal": "refusal" if role == "assistant" else None}.get(kind) if _is_name(kind) else None
    if name is None:
        shown = f"{kind!r} " if _is_name(kind) else "this "
        raise wrong_field(path, f"{shown}is no text part: messages are text here", "unsupported")
    if not isinstance(part.get(name), str):
        raise wrong_field(f"{path}.{name}", "must be a text", "string_type")
    return part[name]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 40
