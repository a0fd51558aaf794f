"""An asynchronous client for one OpenAI-compatible endpoint: one gate, one retry ladder, one ledger.

The OpenAI SDK sends the requests with its own retries off, because they would hide 429s from the gate. Answers are
read here and not by the SDK, which takes any shape for an answer. What is retried, and how:

    out of credit, filtered    never
    429                        all requests of this client wait, see retry.Pacer; costs no attempt
    5xx, timeout,              up to `max_attempts`, exponential backoff with full jitter
    connection, garbage
    cut at max_tokens          once, with twice the room, unless the request keeps truncated answers;
                               twice, with four times the room, where thoughts took all of it
    empty, unfinished          once
    400 to response_format     with the next simpler one, for all requests of this client
    other 4xx                  never
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import httpx2
import openai

from janus_ray.env import api_key, is_loopback
from janus_ray.errors import ConfigError
from janus_ray.llm.answer import Reading, read_answer
from janus_ray.llm.asked import Counts, add_outcome
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.faults import fault_message, kind_of, parsed, rejects_response_format
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, ErrorKind, LLMRequest, Usage
from janus_ray.llm.retry import Breaker, Pacer, RetryPolicy

_RETRIED: frozenset[ErrorKind] = frozenset({"server", "timeout", "connection"})
# How an endpoint is asked for JSON, from the strictest form down; each answer is validated all the same.
_FORMATS = ("json_schema", "json_object", "none")
_MORE_ROOM, _MORE_ROOM_FOR_THOUGHTS = 2, 4
# What a transport raises besides the SDK's own errors: aiohttp lets some of its own through, and a body may name a
# character set that does not exist, or a header hold bytes that are no text.
TRANSPORT_ERRORS = (
    openai.OpenAIError, aiohttp.ClientError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, LookupError,
    RuntimeError, EOFError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One answer of the endpoint, and what it means for the next attempt."""

    reading: Reading
    wait_s: float | None = None
    """Seconds that the server, or the pause after a 429, asks to wait."""
    format_refused: int | None = None
    """Index in _FORMATS of the response format that the endpoint does not take."""

    @classmethod
    def failed(cls, kind: ErrorKind, message: str, **facts: Any) -> _Attempt:
        return cls(Reading(Completion.failure(kind, message, 0)), **facts)


@dataclass(slots=True)
class _Tally:
    """One request on its way to an outcome."""

    request: LLMRequest
    usage: Usage = field(default_factory=Usage)
    sent: int = 0
    attempts: int = 0
    second_chances: int = 0
    deadline: float | None = None
    """When waiting for the server must end; set by the first wait."""
    cut: Completion | None = None
    """The answer that was cut, while one with more room is asked for."""

    def add(self, outcome: Completion) -> None:
        self.usage += outcome.usage
        self.sent += 1
        self.attempts += outcome.error_kind != "rate_limit"

    def settled(self, outcome: Completion) -> Completion:
        if self.cut is not None and outcome.error_kind in ("bad_request", "truncated"):
            room = f"; asked with {self.request.sampling.max_tokens} tokens of room"
            more = f": {outcome.error_message}" if outcome.error_kind == "bad_request" else ""
            outcome = Completion.failure("truncated", f"{self.cut.error_message}{room}{more}", 0)
        return replace(outcome, attempts=self.attempts, usage=self.usage, sent=self.sent)

    def second_chance(self, reading: Reading) -> bool:
        """Whether what came is asked for again, and with how much room."""
        is_cut = reading.outcome.error_kind == "truncated"
        allowed = 2 if reading.before_any_text else 1
        if self.second_chances >= allowed:
            return False
        self.second_chances += 1
        if is_cut:
            sampling = self.request.sampling
            had = sampling.max_tokens or reading.outcome.usage.completion_tokens
            if not had:
                return False
            factor = _MORE_ROOM_FOR_THOUGHTS if reading.before_any_text else _MORE_ROOM
            self.request = replace(self.request, sampling=replace(sampling, max_tokens=factor * had))
            self.cut = reading.outcome
        return True


class ChatClient:
    """Sends chat requests to one endpoint, at most `max_concurrency` at a time, and never raises for one of them."""

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger | None = None,
        *,
        max_concurrency: int | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Opens the connection pool.

        Args:
            endpoint: where to send requests.
            ledger: answers known requests and records new outcomes; None keeps no record.
            max_concurrency: this client's share of the endpoint's limit; None takes all of it.
            retry: waiting times; None takes the usual ones.

        Raises:
            ConfigError: the endpoint's key variable is not set, or a proxy variable names no proxy.
        """
        self._endpoint = endpoint
        self._ledger = ledger
        self._retry = retry or RetryPolicy()
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=api_key(endpoint.api_key_env),
            max_retries=0,
            timeout=endpoint.timeout_s,
            http_client=http_client(openai.DefaultAioHttpClient, endpoint),
        )
        self._gate = asyncio.Semaphore(max_concurrency or endpoint.max_concurrency)
        self._pacer = Pacer(self._retry)
        self._breaker = Breaker(self._retry, endpoint.give_up_after_s)
        self._format = self._format_told = 0
        self._notices: list[str] = []
        self._counts: Counts = Counter()
        if ledger is not None and ledger.skipped:
            self._notice(f"ledger: {ledger.skipped} unreadable lines are skipped; what they held is asked for again")

    async def complete(self, request: LLMRequest) -> Completion:
        """The outcome of a request: from the ledger when it is known, otherwise from the endpoint.

        Raises:
            DataError: the outcome cannot be written to the ledger (a full disk). Nothing else.
        """
        request = request.without(self._endpoint.omit)
        key = request.key(self._endpoint.model, self._endpoint.identity)
        completion = self._ledger.get(key) if self._ledger is not None else None
        if completion is None:
            completion = await self._ask_until_settled(request)
            if self._ledger is not None:
                self._ledger.record(key, completion)
        add_outcome(self._counts, request.stage, completion)
        return completion

    def take_counts(self) -> Counts:
        """What was asked since this was last asked."""
        taken, self._counts = self._counts, Counter()
        return taken

    def take_notices(self) -> list[str]:
        """What a person should hear, one line each, since this was last asked: nobody sees a Ray worker's output."""
        taken, self._notices = self._notices, []
        return taken

    async def close(self) -> None:
        """Closes the connection pool."""
        await self._client.close()

    async def _ask_until_settled(self, request: LLMRequest) -> Completion:
        tally = _Tally(request)
        while not self._breaker.is_down():
            attempt = await self._ask_once(tally.request)
            tally.add(attempt.reading.outcome)
            if not await self._is_asked_again(tally, attempt):
                return tally.settled(attempt.reading.outcome)
        return tally.settled(Completion.failure("endpoint_down", "the endpoint has answered nothing for too long", 0))

    async def _is_asked_again(self, tally: _Tally, attempt: _Attempt) -> bool:
        """Decides whether there is another attempt, and waits for its time."""
        kind = attempt.reading.outcome.error_kind
        if attempt.format_refused is not None:
            # Of the requests that were on their way together, one finds out.
            self._format = max(self._format, attempt.format_refused + 1)
            return True
        if kind == "rate_limit":
            # The pause itself is waited for in front of the next attempt.
            return self._may_wait(tally, attempt.wait_s or 0.0)
        if kind in _RETRIED and tally.attempts < self._endpoint.max_attempts:
            if attempt.wait_s and not self._may_wait(tally, attempt.wait_s):
                return False
            await self._retry.sleep(attempt.wait_s or self._retry.backoff_s(tally.attempts))
            return True
        if kind == "truncated" and "max_tokens" in self._endpoint.omit:
            return False
        return kind in ("truncated", "empty", "unfinished") and tally.second_chance(attempt.reading)

    def _may_wait(self, tally: _Tally, wait_s: float) -> bool:
        """Whether a wait that the server asks for ends before the request's patience does."""
        now = self._retry.clock()
        tally.deadline = tally.deadline or now + self._endpoint.max_wait_s
        return now + wait_s <= tally.deadline

    async def _ask_once(self, request: LLMRequest) -> _Attempt:
        """One attempt, behind the gate and after any pause."""
        async with self._gate:
            await self._pacer.wait()
            sent_at, response_format = self._retry.clock(), self._format
            body = chat_body(self._endpoint, request, _FORMATS[response_format])
            try:
                answer = await asyncio.wait_for(
                    # Not chat.completions.create(): its recursive check of the parameters costs more than the rest of
                    # the request together, and the parameters are ours.
                    self._client.post("/chat/completions", cast_to=httpx2.Response, body=body),
                    self._endpoint.timeout_s,
                )
            except openai.APIStatusError as error:
                asked = response_format if request.json_schema is not None else None
                return self._refused(error.response, sent_at, asked)
            except TRANSPORT_ERRORS as error:
                self._breaker.note(failed=True)
                if is_timeout(error):
                    return _Attempt.failed("timeout", f"no answer within {self._endpoint.timeout_s:g} s")
                return _Attempt.failed("connection", why(error))
        reading = read_answer(
            answer.content, keep_truncated=request.keep_truncated, max_tokens=request.sampling.max_tokens
        )
        kind = reading.outcome.error_kind
        self._breaker.note(failed=kind == "server")
        told_s = self._retry.told_s(answer.headers)
        if kind == "rate_limit":
            return _Attempt(reading, self._pacer.refused(sent_at, told_s))
        self._pacer.accepted(sent_at)
        self._tell_format(response_format)
        return _Attempt(reading, told_s if kind == "server" else None)

    def _refused(self, response: httpx2.Response, sent_at: float, response_format: int | None) -> _Attempt:
        """Reads an HTTP error; `response_format` is the form of JSON that was asked for, if any."""
        body = parsed(response.content)
        kind = kind_of(response.status_code, body)
        self._breaker.note(failed=kind == "server")
        message = fault_message(response.status_code, body)
        is_simplest = response_format is None or response_format == len(_FORMATS) - 1
        if not is_simplest and kind != "content_filter" and rejects_response_format(response.status_code, body):
            return _Attempt.failed(kind, message, format_refused=response_format)
        told_s = self._retry.told_s(response.headers)
        if kind == "rate_limit":
            return _Attempt.failed(kind, message, wait_s=self._pacer.refused(sent_at, told_s))
        return _Attempt.failed(kind, message, wait_s=told_s)

    def _tell_format(self, accepted: int) -> None:
        """Says once which response format the endpoint takes, where it is not the one that was wanted."""
        if accepted <= self._format_told:
            return
        self._format_told = accepted
        refused = " and ".join(_FORMATS[:accepted])
        instead = "the schema stands in the prompt" if accepted == 2 else "asked for json_object instead"
        self._notice(f"{self._endpoint.model}: {self._endpoint.url} refuses response_format {refused}; {instead}")

    def _notice(self, line: str) -> None:
        self._notices.append(line)
        print(line, flush=True)


def chat_body(endpoint: Endpoint, request: LLMRequest, response_format: str = "json_schema") -> dict[str, Any]:
    """The body of a chat request, as this endpoint takes it."""
    sampling = request.sampling
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        endpoint.max_tokens_field: sampling.max_tokens,
        # Not OpenAI's, but vLLM's and others'; sent only when the recipe asks for it.
        "repetition_penalty": sampling.repetition_penalty,
        "seed": request.seed,
    }
    parameters: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    messages = list(request.messages)
    if request.json_schema is not None and response_format == "json_schema":
        schema = {"name": request.stage, "schema": dict(request.json_schema), "strict": True}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.json_schema is not None and messages:
        # The model must know the schema from somewhere.
        schema = json.dumps(request.json_schema, ensure_ascii=False)
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\nJSON schema of the answer:\n{schema}"}
        if response_format == "json_object":
            parameters["response_format"] = {"type": "json_object"}
    return {"model": endpoint.model, "messages": messages, **parameters}


def is_timeout(error: BaseException | None) -> bool:
    """Whether a timeout stands anywhere behind an error: the transport reports lost connections as timeouts too."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__
    return False


def why(error: BaseException) -> str:
    """What a connection failed of, in the transport's words."""
    return f"{error.__cause__ or error}" or type(error).__name__


def http_client(kind: Any, endpoint: Endpoint) -> Any:
    """The SDK's HTTP client, with the environment's proxies unless the endpoint is on this machine."""
    try:
        return kind(trust_env=not is_loopback(endpoint.url))
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        raise ConfigError(f"http_proxy, https_proxy, all_proxy or no_proxy in the environment: {error}") from None
