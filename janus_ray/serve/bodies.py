"""From the bytes of a request to a JSON object of which every reader would say the same.

JSON leaves open what a name that stands twice means, and Python's reader takes more than JSON has: NaN, numbers beyond
every float, halves of surrogate pairs. Each of these is refused or made well-formed here, before anything looks at it.
"""

from __future__ import annotations

import json
import math
from email.message import Message
from typing import Any

from janus_ray.serve.refusals import ApiError, wrong_field
from janus_ray.text import well_formed, well_formed_values

# Deeper than any JSON schema, and far from what would exhaust the stack of a reader further on.
_MAX_NESTING = 64
# Python itself refuses to read integers from 4,300 digits on, because the time grows with their square.
_MAX_DIGITS = 400
_UTF8_MARK = b"\xef\xbb\xbf"
# Also how Excel and Python say it, and a header that begins to say it.
_UTF8_NAMES = ("", "utf-8", "utf8", "utf-8-sig")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_object(raw: bytes, content_type: str | None) -> dict[str, Any]:
    """Reads the body of a request.

    Args:
        raw: the body; a byte order mark before it is skipped.
        content_type: the request's header, if it has one.

    Returns:
        The object. Its texts are well-formed and its numbers finite.

    Raises:
        ApiError: 400 with the reason.
    """
    kind, charset = _stated(content_type)
    text = _decoded(raw, charset)
    if not text.strip():
        raise _refused("the body is empty; it must be a JSON object")
    value = _parsed(text, kind)
    if not isinstance(value, dict):
        raise _refused("the body must be a JSON object")
    if _deeper_than(value, _MAX_NESTING):
        raise _refused(f"the body is nested more than {_MAX_NESTING} levels deep")
    _refuse_odd_numbers(value, "")
    return well_formed_values(value)


def _refused(message: str, code: str = "json_invalid") -> ApiError:
    return ApiError(400, message, code=code)


def _stated(content_type: str | None) -> tuple[str, str]:
    """Media type and character set of the header; JSON in UTF-8 where it does not say."""
    header = Message()
    header["content-type"] = content_type or "application/json"
    return header.get_content_type(), header.get_content_charset("utf-8")


def _decoded(raw: bytes, charset: str) -> str:
    if raw.startswith(_UTF16_MARKS) or b"\0" in raw[:4]:
        raise _refused("the body must be UTF-8; this looks like UTF-16 or UTF-32", "encoding")
    if not raw.isascii() and charset.replace("_", "-") not in _UTF8_NAMES:
        raise _refused(f"the body must be UTF-8, not {_shown(charset)}", "encoding")
    try:
        return raw.removeprefix(_UTF8_MARK).decode()
    except UnicodeDecodeError as error:
        raise _refused(f"the body must be UTF-8; byte {error.start} is not", "encoding") from None


def _parsed(text: str, kind: str) -> Any:
    """Parses a body. What is JSON is taken under any name: `curl -d` says that it sends a form."""
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
    except json.JSONDecodeError as error:
        where = f"{error.msg.lower()} (line {error.lineno}, column {error.colno})"
        named = "" if kind.endswith("json") else f"; it was sent as {_shown(kind)}"
        raise _refused(f"the body is not valid JSON: {where}{named}") from None
    except RecursionError:
        raise _refused(f"the body is nested more than {_MAX_NESTING} levels deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        name = well_formed(name)
        if name in values:
            raise _refused(f"the name {_shown(name)} stands twice in one object")
        values[name] = value
    return values


class _Odd(float):
    """Stands for a number that no program could take until it is known which field it is in."""

    problem: str


def _odd(problem: str) -> _Odd:
    number = _Odd("nan")
    number.problem = problem
    return number


def _constant(name: str) -> float:
    return _odd(f"{name} is not a JSON number")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else _odd(f"this number has {len(digits)} digits")


def _number(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _odd(f"this number is too large: {_shown(digits)}")


def _refuse_odd_numbers(value: Any, path: str) -> None:
    if isinstance(value, _Odd):
        raise wrong_field(path, value.problem, "json_invalid")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_odd_numbers(inner, f"{path}.{name}" if path else str(name))


def _shown(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [inner for one in layer if isinstance(one, dict | list) for inner in _inside(one)]
        if not layer:
            return False
    return any(isinstance(one, dict | list) for one in layer)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
