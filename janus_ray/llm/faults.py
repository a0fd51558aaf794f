"""Reading what an endpoint says when it refuses: which kind of fault, and the provider's words.

Providers agree on little: the error is an object, a list, a text or an HTML page, its code a number, a text or a
status, and some send it with HTTP 200.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from janus_ray.llm.request import ErrorKind
from janus_ray.text import well_formed

# What 429 and 402 also mean: no money left. Waiting does not help.
_QUOTA_CODES = frozenset(
    {
        "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance",
        "insufficient_credits", "exceeded_current_quota_error", "payment_required",
    }
)  # fmt: skip
_FILTER_CODES = frozenset(
    {
        "content_filter", "content_filtered", "content_policy_violation", "responsibleaipolicyviolation",
        "data_inspection_failed", "datainspectionfailed", "moderation_blocked", "prohibited_content",
    }
)  # fmt: skip
# Codes without a number, as parts of words.
_CODE_WORDS: tuple[tuple[ErrorKind, tuple[str, ...]], ...] = (
    ("rate_limit", ("rate_limit", "ratelimit", "too_many_requests", "throttl", "resource_exhausted")),
    ("auth", ("invalid_api_key", "authentication", "unauthorized", "unauthenticated", "permission", "forbidden")),
    ("bad_request", ("invalid_request", "bad_request", "context_length", "not_found", "unprocessable", "unsupported")),
)
_WORDS = (
    "message", "msg", "error_message", "error_msg", "error_description", "detail", "details", "error", "errors",
    "description", "reason", "title", "raw",
)  # fmt: skip
_HOLDS_CODES = ("innererror", "inner_error", "detail", "errors", "metadata", "raw")
_ABOUT_THE_FORMAT = re.compile(
    r"response_?\s?format|json[_ ]?(schema|object|mode)|structured[_ ]?outputs?|guided[_ ](json|decoding)",
    re.IGNORECASE,
)
_DEEPEST = 6
# In characters; what is longer is prose, and may say anything.
_LONGEST_CODE = 80


def parsed(content: bytes) -> Any:
    """The body as JSON where it is JSON, else as text."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        # Bytes that are no text, numbers of thousands of digits and bottomless nesting end here too.
        return content.decode("utf-8", "replace")


def kind_of(status: int, body: Any) -> ErrorKind:
    """The kind of fault. With HTTP 200, the code inside the error counts as the status."""
    codes = list(_codes(body))
    named = {in_snake_case(code) for code in codes if isinstance(code, str) and len(code) <= _LONGEST_CODE}
    if status < 400:
        status = next((number for code in codes if (number := _http_status(code))), 0)
    if status not in (408, 429) and status < 500 and (named & _FILTER_CODES or _was_flagged(body)):
        return "content_filter"
    if status == 402 or named & _QUOTA_CODES:
        return "quota"
    if status == 429:
        return "rate_limit"
    if status in (0, 400, 403):
        for kind, parts in _CODE_WORDS:
            if any(part in code for code in named for part in parts) and (kind == "rate_limit" or status == 0):
                return kind
    if status in (401, 403):
        return "auth"
    return "bad_request" if 400 <= status < 500 and status != 408 else "server"


def in_snake_case(code: str) -> str:
    """One spelling for "Too Many Requests", "too-many-requests" and "TOO_MANY_REQUESTS"."""
    return re.sub(r"[\s-]+", "_", code.strip()).lower()


def words_of(body: Any) -> str:
    """The provider's words; "" where a body has none."""
    found = _words(body, _DEEPEST)
    if not found and isinstance(body, dict | list) and body:
        found = _compact(body)
    return well_formed(found)


def fault_message(status: int, body: Any) -> str:
    """One line for the row: the status and the provider's words, or what the status is called."""
    try:
        called = HTTPStatus(status).phrase
    except ValueError:
        called = "without a word"
    return f"HTTP {status}: {words_of(body) or called}"


def rejects_response_format(status: int, body: Any) -> bool:
    """Whether a refusal is about `response_format`, and not about the request."""
    if status not in (400, 404, 415, 422, 501):
        return False
    error = body.get("error", body) if isinstance(body, dict) else body
    parameter = error.get("param") if isinstance(error, dict) else None
    if isinstance(parameter, str) and parameter and not _ABOUT_THE_FORMAT.search(parameter):
        return False
    return bool(_ABOUT_THE_FORMAT.search(f"{parameter} {words_of(body)}"))


def _codes(body: Any, deepest: int = _DEEPEST) -> Iterator[Any]:
    """Every code, type and status inside an error, outermost first."""
    if isinstance(body, list) and deepest:
        for inner in body[:3]:
            yield from _codes(inner, deepest - 1)
    if not isinstance(body, dict) or not deepest:
        return
    error = body.get("error")
    yield from _codes(error, deepest - 1)
    own = (body.get(name) for name in ("code", "status", "type", "error_code", "status_code"))
    yield from (code for code in (error, *own) if isinstance(code, str | int | float))
    for name in _HOLDS_CODES:
        inner = body.get(name)
        # Routers hand the answer of the provider behind them on as text.
        yield from _codes(parsed(well_formed(inner).encode()) if isinstance(inner, str) else inner, deepest - 1)


def _http_status(code: Any) -> int:
    """The code as an HTTP error status, or 0."""
    if isinstance(code, str) and (found := re.match(r"(?:http|error)?[\s_]*([45]\d\d)\b", code, flags=re.I | re.A)):
        return int(found[1])
    is_number = isinstance(code, int | float) and not isinstance(code, bool)
    return int(code) if is_number and 400 <= code < 600 else 0


def _was_flagged(body: Any) -> bool:
    """OpenRouter's form of a content filter: 403 and the input that was flagged."""
    error = body.get("error") if isinstance(body, dict) else None
    metadata = error.get("metadata") if isinstance(error, dict) else None
    return isinstance(metadata, dict) and "flagged_input" in metadata


def _words(value: Any, deepest: int) -> str:
    if isinstance(value, str):
        return _plain(value)
    if not deepest:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, (_words(inner, deepest - 1) for inner in value[:3])))
    if not isinstance(value, dict):
        return ""
    found = next(filter(None, (_words(value.get(name), deepest - 1) for name in _WORDS)), "")
    place = value.get("loc")
    if found and isinstance(place, list):
        found = f"{'.'.join(str(part) for part in place if isinstance(part, str | int))}: {found}"
    # A router's own words say little; those of the provider behind it lie deeper.
    behind = value.get("metadata")
    behind = _words(behind.get("raw"), deepest - 1) if isinstance(behind, dict) else ""
    return f"{found} ({behind})" if found and behind else found or behind


def _plain(text: str) -> str:
    """A text without markup: of an HTML page its title, or else what a reader would see."""
    text = text[:4000]
    if not text.lstrip("\ufeff \t\r\n").startswith("<"):
        return text.strip()
    title = re.search(r"<title[^>]*>([^<]*)", text, flags=re.IGNORECASE)
    shown = (
        title[1] if title and title[1].strip() else re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.S)
    )
    return " ".join(html.unescape(shown).split())


def _compact(body: Any) -> str:
    try:
        return json.dumps(body, ensure_ascii=False)[:200]
    except RecursionError:
        return ""
