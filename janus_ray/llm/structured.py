"""Answers that must fit a pydantic model: schema in the request, validation, bounded re-asking with the error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from janus_ray.llm.client import ChatClient
from janus_ray.llm.request import Completion, LLMRequest
from janus_ray.text import well_formed_values

Answer = TypeVar("Answer", bound=BaseModel)

# Braces that begin no JSON are looked past, so often and no more: each costs a parse.
_MOST_STARTS = 200


@cache
def _schema(answer_type: type[BaseModel]) -> dict[str, Any]:
    return answer_type.model_json_schema()


async def complete_structured(
    client: ChatClient, request: LLMRequest, answer_type: type[Answer], max_reasks: int = 2
) -> tuple[Answer | None, Completion]:
    """Asks until the answer validates, at most `max_reasks` further times.

    The schema goes out as `response_format`; a server may ignore it, so the answer is validated all the same. Each
    re-ask shows the model its answer and what was wrong with it.

    Returns:
        The validated answer, or None, and the outcome with attempts and usage summed over all asks. An answer that
        never validates is the error "schema_invalid".
    """
    request = replace(request, json_schema=_schema(answer_type))
    total = Completion("error")
    asks = 0
    problem = ""
    while asks <= max_reasks:
        completion = await client.complete(request)
        total = replace(
            completion,
            attempts=total.attempts + completion.attempts,
            usage=total.usage + completion.usage,
            sent=total.sent + completion.sent,
        )
        if completion.status != "ok":
            return None, total
        # An answer from the ledger is not an ask: a rerun goes on where the last one gave up.
        asks += completion.sent > 0
        try:
            return read_structured(completion.text, answer_type), total
        except Unfit as error:
            problem = str(error)
        request = replace(
            request,
            sample_index=request.sample_index + 1,
            messages=(
                *request.messages,
                {"role": "assistant", "content": completion.text},
                {"role": "user", "content": f"That does not fit the schema: {problem}. Answer again, JSON only."},
            ),
        )
    failed = Completion.failure("schema_invalid", problem, total.attempts, total.usage)
    return None, replace(failed, sent=total.sent)


class Unfit(Exception):
    """What keeps a text from being the answer, in words for the model."""


def read_structured(text: str, answer_type: type[Answer]) -> Answer:
    """The one JSON object in a text that fits, whatever stands around it: a preface, a code fence, words behind.

    Raises:
        Unfit: no object fits, or more than one that differ.
    """
    fitting: list[Answer] = []
    problem = "answer: no JSON object"
    for candidate in _objects(text):
        try:
            found = answer_type.model_validate(candidate)
        except ValidationError as error:
            problem = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}" for e in error.errors()[:3])
            continue
        if found not in fitting:
            fitting.append(found)
    if len(fitting) == 1:
        return fitting[0]
    raise Unfit("answer: more than one JSON object fits, and they differ" if fitting else problem)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand side by side in a text; what lies inside one, whole or broken, is not its equal."""
    if text.lstrip("\ufeff \t\r\n").startswith('"'):
        text = _unquoted(text)
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    start = text.find("{")
    for _ in range(_MOST_STARTS):
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(text, start)
            yield well_formed_values(value)
        except json.JSONDecodeError as error:
            # Where it broke: an inner object of a broken one is a part of an answer, not the answer.
            end = error.pos
        except (ValueError, RecursionError):
            return
        start = text.find("{", max(start + 1, end))


def _unquoted(text: str) -> str:
    """A JSON text that holds JSON, decoded once."""
    try:
        inner = json.loads(text.strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError):
        return text
    return inner if isinstance(inner, str) else text


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
