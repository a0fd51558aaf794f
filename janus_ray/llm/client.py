"""An asynchronous client for one OpenAI-compatible endpoint: one gate, one retry ladder, one ledger.

The OpenAI SDK sends the requests with its own retries off, because they would hide 429s from the gate. What is
retried, and how:

    out of credit          never
    429                    waits as Retry-After says (all requests of this client wait); costs no attempt
    5xx, timeout,          up to `max_attempts`, exponential backoff with full jitter
    connection, garbage
    truncated              once, with twice the room, unless the request keeps truncated answers
    empty                  once
    other 4xx              never
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import replace
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from janus_ray.env import api_key
from janus_ray.errors import ConfigError
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, ErrorKind, LLMRequest, Usage

_BACKOFF_BASE_S = 0.5
_BACKOFF_CAP_S = 30.0
# What 429 and 402 also mean: no money left. Waiting does not help.
_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
# An endpoint counts as down after this many failures in a row that span `give_up_after_s`; then one request tries
# again every few seconds.
_FAILURES_IN_A_ROW = 8
_PROBE_EVERY_S = 5.0
_RETRIED: frozenset[ErrorKind] = frozenset({"server", "timeout", "connection"})


class ChatClient:
    """Sends chat requests to one endpoint, at most `max_concurrency` at a time, and never raises for one of them."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger | None = None, *, max_concurrency: int | None = None) -> None:
        """Opens the connection pool.

        Args:
            endpoint: where to send requests.
            ledger: answers known requests and records new outcomes; None keeps no record.
            max_concurrency: this client's share of the endpoint's limit; None takes all of it.

        Raises:
            ConfigError: the endpoint's key variable is not set.
        """
        self._endpoint = endpoint
        self._ledger = ledger
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=api_key(endpoint.api_key_env),
            max_retries=0,
            timeout=endpoint.timeout_s,
            http_client=openai.DefaultAioHttpClient(),
        )
        self._gate = asyncio.Semaphore(max_concurrency or endpoint.max_concurrency)
        self._paused_until = 0.0
        self._failing_since = 0.0
        self._failures = 0
        self._next_probe = 0.0

    async def complete(self, request: LLMRequest) -> Completion:
        """The outcome of a request: from the ledger when it is known, otherwise from the endpoint."""
        key = request.key(self._endpoint.model, self._endpoint.base_url)
        known = self._ledger.get(key) if self._ledger is not None else None
        if known is not None:
            return known
        completion = await self._ask_until_settled(request)
        if self._ledger is not None:
            self._ledger.record(key, completion)
        return completion

    async def close(self) -> None:
        """Closes the connection pool."""
        await self._client.close()

    async def _ask_until_settled(self, request: LLMRequest) -> Completion:
        usage = Usage()
        sent = attempts = second_chances = 0
        deadline = time.monotonic() + self._endpoint.max_wait_s
        while True:
            if self._considered_down():
                down = Completion.failure("endpoint_down", "the endpoint has answered nothing for too long", attempts)
                return replace(down, sent=sent)
            outcome, retry_after_s = await self._ask_once(request)
            usage += outcome.usage
            kind = outcome.error_kind
            sent += 1
            attempts += kind != "rate_limit"
            settled = replace(outcome, attempts=attempts, usage=usage, sent=sent)
            if kind == "rate_limit":
                wait_s = retry_after_s if retry_after_s is not None else random.uniform(0.5, 2.0)
                self._paused_until = max(self._paused_until, time.monotonic() + wait_s)
                if time.monotonic() + wait_s > deadline:
                    return settled
            elif kind in ("truncated", "empty") and second_chances == 0:
                second_chances += 1
                if kind == "truncated" and request.sampling.max_tokens:
                    roomier = replace(request.sampling, max_tokens=2 * request.sampling.max_tokens)
                    request = replace(request, sampling=roomier)
            elif kind in _RETRIED and attempts < self._endpoint.max_attempts:
                ceiling_s = min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2 ** (attempts - 1))
                await asyncio.sleep(retry_after_s or random.uniform(0, ceiling_s))
            else:
                return settled

    async def _ask_once(self, request: LLMRequest) -> tuple[Completion, float | None]:
        """One attempt: its outcome and, where the server said so, the seconds to wait before the next."""
        async with self._gate:
            # A pause may be prolonged while we sleep through it.
            while (pause_s := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(pause_s)
            try:
                answer = await asyncio.wait_for(
                    # Not chat.completions.create(): its recursive check of the parameters costs more than the rest of
                    # the request together, and the parameters are ours.
                    self._client.post("/chat/completions", cast_to=ChatCompletion, body=self._body(request)),
                    self._endpoint.timeout_s,
                )
            except openai.APIStatusError as error:
                kind = _kind_of_status(error)
                # An endpoint that answers, even with a refusal, is not down; one that answers 5xx may be.
                self._note_success() if kind != "server" else self._note_failure()
                return Completion.failure(kind, _message(error), 0), _retry_after_s(error)
            except (openai.APIConnectionError, TimeoutError) as error:
                self._note_failure()
                if _is_timeout(error):
                    return Completion.failure("timeout", f"no answer within {self._endpoint.timeout_s:g} s", 0), None
                return Completion.failure("connection", f"{error.__cause__ or error}", 0), None
            except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError) as error:
                self._note_failure()
                return Completion.failure("server", f"the answer is not a chat completion: {error}", 0), None
        outcome = _outcome(answer, keep_truncated=request.keep_truncated)
        self._note_success() if outcome.error_kind != "server" else self._note_failure()
        return outcome, None

    def _body(self, request: LLMRequest) -> dict[str, Any]:
        sampling = request.sampling
        optional = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            # Not OpenAI's, but vLLM's and others'; sent only when the recipe asks for it.
            "repetition_penalty": sampling.repetition_penalty,
            "seed": request.seed,
        }
        parameters: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        if request.json_schema is not None:
            schema = {"name": request.stage, "schema": dict(request.json_schema), "strict": True}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {"model": self._endpoint.model, "messages": list(request.messages), **parameters}

    def _note_success(self) -> None:
        self._failures = 0

    def _note_failure(self) -> None:
        if self._failures == 0:
            self._failing_since = time.monotonic()
        self._failures += 1

    def _considered_down(self) -> bool:
        """Whether to fail a request unasked; one request in every few seconds is let through to find out."""
        now = time.monotonic()
        if self._failures < _FAILURES_IN_A_ROW or now - self._failing_since <= self._endpoint.give_up_after_s:
            return False
        if now >= self._next_probe:
            self._next_probe = now + _PROBE_EVERY_S
            return False
        return True


def check_endpoint(endpoint: Endpoint, role: str) -> None:
    """Asks the endpoint for its models before any work starts.

    An endpoint that is merely busy (429, 5xx) passes: the retries are there for it. So does one without a list.

    Raises:
        ConfigError: it does not answer, rejects the key, or does not have the model.
    """
    client = openai.OpenAI(
        base_url=endpoint.url, api_key=api_key(endpoint.api_key_env), max_retries=0, timeout=min(15, endpoint.timeout_s)
    )
    try:
        models = [model.id for model in client.models.list().data]
    except openai.APITimeoutError:
        raise ConfigError(f"{role}: {endpoint.url} does not answer in time") from None
    except openai.APIConnectionError as error:
        raise ConfigError(f"{role}: {endpoint.url} cannot be reached ({error.__cause__ or error})") from None
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        source = f"the key in {endpoint.api_key_env}" if endpoint.api_key_env else "a request without a key"
        raise ConfigError(f"{role}: {endpoint.url} rejects {source}") from None
    except openai.APIStatusError:
        return
    except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        raise ConfigError(
            f"{role}: {endpoint.url} does not speak the OpenAI protocol (/models is not a list)"
        ) from None
    finally:
        client.close()
    if models and endpoint.model not in models:
        raise ConfigError(f"{role}: {endpoint.url} has no model {endpoint.model!r}; it has: {', '.join(models[:10])}")


def _outcome(answer: ChatCompletion | Any, *, keep_truncated: bool) -> Completion:
    """Reads a completion; anything malformed is a server error."""
    try:
        choice = answer.choices[0]
        text, refusal = _text_of(choice.message.content), choice.message.refusal
        usage = Usage(*(int(getattr(answer.usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # The SDK builds its objects without validation, whatever came over the wire.
        return Completion.failure("server", f"the answer is not a chat completion: {str(answer)[:120]!r}", 0)
    if refusal:
        return Completion.failure("refusal", refusal, 0, usage)
    if choice.finish_reason == "content_filter":
        return Completion.failure("content_filter", "the endpoint's content filter stopped the answer", 0, usage)
    if choice.finish_reason == "length" and not keep_truncated:
        return Completion.failure("truncated", "the answer was cut at max_tokens", 0, usage)
    if not text.strip():
        return Completion.failure("empty", "the answer is empty", 0, usage)
    return Completion("ok", text=text, finish_reason=choice.finish_reason, usage=usage)


def _is_timeout(error: BaseException | None) -> bool:
    """Whether a timeout stands anywhere behind an error: the transport reports lost connections as timeouts too."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__
    return False


def _text_of(content: Any) -> str:
    """The text of a message; some servers send a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _kind_of_status(error: openai.APIStatusError) -> ErrorKind:
    status = error.status_code
    if status == 402 or error.code in _QUOTA_CODES or error.type in _QUOTA_CODES:
        return "quota"
    if status == 429:
        return "rate_limit"
    if status in (401, 403):
        return "auth"
    return "server" if status >= 500 or status == 408 else "bad_request"


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    detail = body.get("message") if isinstance(body, dict) else None
    return f"HTTP {error.status_code}: {detail or error.message}"


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds from a Retry-After header; dates and nonsense count as absent, more than ten minutes as ten."""
    try:
        return min(600.0, max(0.0, float(error.response.headers.get("retry-after", ""))))
    except ValueError:
        return None
