"""One line of a ledger: how it is written, and what is no record."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from janus_ray.llm.request import Completion, ErrorKind, Usage
from janus_ray.records import Status

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class _Tokens(msgspec.Struct, gc=False):
    prompt_tokens: _Count
    completion_tokens: _Count


class LedgerLine(msgspec.Struct, gc=False):
    """A finished request. Strict: a line of another shape is no record of ours, whatever could be made of it."""

    key: str
    status: Status
    text: str
    finish_reason: Literal["stop", "length"] | None
    error_kind: ErrorKind | None
    error_message: str | None
    attempts: _Count
    usage: _Tokens
    sent: _Count

    def completion(self) -> Completion:
        """The outcome, marked as not paid for again."""
        usage = Usage(self.usage.prompt_tokens, self.usage.completion_tokens)
        return Completion(
            self.status, self.text, self.finish_reason, self.error_kind, self.error_message, self.attempts, usage
        )


_decoder = msgspec.json.Decoder(LedgerLine)


def parsed_line(line: bytes) -> LedgerLine | None:
    """The record in a line; None where it is none."""
    try:
        record = _decoder.decode(line)
    # Not UTF-8; nested more deeply than Python goes.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return record if (record.error_kind is None) == (record.status == "ok") else None


def written_line(key: str, completion: Completion) -> bytes:
    """The line of a record, its line break included."""
    usage = _Tokens(completion.usage.prompt_tokens, completion.usage.completion_tokens)
    record = LedgerLine(
        key,
        completion.status,
        completion.text,
        completion.finish_reason,
        completion.error_kind,
        completion.error_message,
        completion.attempts,
        usage,
        completion.sent,
    )
    return msgspec.json.encode(record) + b"\n"
