"""How a refusal looks: OpenAI's error envelope around one sentence of ours."""

from __future__ import annotations

from typing import Any

_SHOWN_CHARACTERS = 200
_TYPES = {429: "rate_limit_error", 503: "service_unavailable"}


class ApiError(Exception):
    """A refusal on its way to the caller."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Takes what the caller is told.

        Args:
            status: of the HTTP answer.
            message: one sentence, without anything of the server's insides.
            param: the request's field that it is about.
            code: what programs can test.
            retry_after_s: when to come back, where that is known better than the recipe's `retry_after_s`.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 429 else _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def overloaded() -> ApiError:
    """The refusal of a request for which there is no room."""
    return ApiError(429, "every replica is busy and the queue is full", code="overloaded")


def wrong_field(path: str, problem: str, code: str) -> ApiError:
    """The refusal of one field, named by its path in the request."""
    path = path if len(path) <= _SHOWN_CHARACTERS else f"{path[:_SHOWN_CHARACTERS]}…"
    path = path if path and path.isprintable() else repr(path)
    return ApiError(400, f"{path}: {problem}", param=path, code=code)
