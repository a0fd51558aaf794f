"""What came of a request, in the words that every row, table and manifest uses."""

from __future__ import annotations

from enum import StrEnum

from janus_ray.llm.request import Completion


class Status(StrEnum):
    """What came of one request, or why there was none."""

    OK = "ok"
    TRUNCATED = "truncated"
    """An answer that was cut at max_tokens and is kept as it is."""
    EMPTY = "empty"
    """The model answered with nothing."""
    UNFINISHED = "unfinished"
    """Cut before any text, also with more room, or never said to be finished."""
    REFUSAL = "refusal"
    """The model or the endpoint's filter declined."""
    API_FAIL = "api_fail"
    """The endpoint did not do its part; asked again, it may."""
    PARSE_FAIL = "parse_fail"
    """An answer that does not say what was asked for."""
    NO_RESPONSE = "no_response"
    """There was nothing to ask about."""


_OF_ERRORS = {
    "empty": Status.EMPTY,
    "truncated": Status.UNFINISHED,
    "unfinished": Status.UNFINISHED,
    "refusal": Status.REFUSAL,
    "content_filter": Status.REFUSAL,
}


def status_of(outcome: Completion) -> Status:
    """What came of a request that was sent."""
    if outcome.status == "ok":
        return Status.TRUNCATED if outcome.finish_reason == "length" else Status.OK
    return _OF_ERRORS.get(outcome.error_kind or "", Status.API_FAIL)
