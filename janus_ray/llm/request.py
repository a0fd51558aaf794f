"""What is asked of a language model, what comes back, and the content key that ties them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from janus_ray.chat import Message
from janus_ray.records import Status, canonical_json
from janus_ray.text import one_line, well_formed_values

# rate_limit  429                            overload and connection trouble is retried, see client.py
# server      5xx, or an answer that is not a chat completion
# bad_request other 4xx                      never retried: the same request gets the same refusal
# unfinished  a half, a tool call, thoughts  asked once more: what came is not an answer
ErrorKind = Literal[
    "rate_limit", "server", "timeout", "connection", "bad_request", "auth", "quota", "content_filter", "refusal",
    "truncated", "empty", "unfinished", "schema_invalid", "endpoint_down",
]  # fmt: skip

# Errors that the same request meets again: the ledger answers with them, as with successes.
FINAL_KINDS: frozenset[ErrorKind] = frozenset({"content_filter"})


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding parameters, named as in the OpenAI API; None leaves the server's default."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """One chat completion to obtain.

    `stage`, `prompt_sha256`, `sample_index` and `seed` take part in the content key beside the messages and
    parameters: together they are everything that may change the answer.
    """

    stage: str
    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    prompt_sha256: str = ""
    sample_index: int = 0
    seed: int | None = None
    json_schema: Mapping[str, Any] | None = None
    keep_truncated: bool = False
    """True returns a response cut at max_tokens as it is; False asks once more with twice the room. One that was cut
    before any text, because its room went to thoughts, is asked for with more room either way."""
    custom_id: str = ""
    """What the asker knows the request by. It is not sent and takes no part in the content key."""

    def without(self, parameters: Collection[str]) -> LLMRequest:
        """The request as it can be sent: well-formed texts, and none of the parameters that the endpoint omits."""
        unset = {name: None for name in asdict(self.sampling) if name in parameters}
        return replace(
            self,
            messages=tuple(well_formed_values(self.messages)),
            sampling=replace(self.sampling, **unset) if unset else self.sampling,
            seed=None if "seed" in parameters else self.seed,
        )

    def key(self, model: str, endpoint: str) -> str:
        """SHA-256 over everything that changes the answer, the model and the endpoint's identity included."""
        # Not asdict(): it would copy every message. What is unset does not take part, so that a parameter which is
        # added to this class later leaves the keys of the requests without it as they are.
        content = {name: getattr(self, name) for name in self.__slots__ if name != "custom_id"} | {
            "sampling": {name: value for name, value in asdict(self.sampling).items() if value is not None},
            "model": model,
            "endpoint": endpoint,
        }
        content = {name: value for name, value in content.items() if value is not None}
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the endpoint counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Sums two usages."""
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of a request. An error is an outcome too: nothing is raised for one row among many."""

    status: Status
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    """How an answer ended, however the server spells it; "length" only where the request keeps truncated answers."""
    error_kind: ErrorKind | None = None
    error_message: str | None = None
    attempts: int = 0
    usage: Usage = field(default_factory=Usage)
    sent: int = 0
    """HTTP requests that this run made for it, 429s included; 0 when the ledger knew the answer."""

    @classmethod
    def failure(cls, kind: ErrorKind, message: str, attempts: int, usage: Usage | None = None) -> Completion:
        """An error outcome; the message is kept to one printable line of at most 300 characters."""
        return cls("error", error_kind=kind, error_message=one_line(message), attempts=attempts, usage=usage or Usage())

    def from_ledger(self) -> Completion:
        """The same outcome, marked as not paid for again."""
        return replace(self, sent=0)


def derived_seed(global_seed: int, *parts: object) -> int:
    """A 31-bit seed that depends on the parts only, so that a rerun and another order give the same samples."""
    text = "|".join(str(part) for part in (global_seed, *parts))
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
