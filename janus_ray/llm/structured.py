"""Answers that must fit a pydantic model: schema in the request, validation, bounded re-asking with the error."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from janus_ray.llm.client import ChatClient
from janus_ray.llm.request import Completion, LLMRequest

Answer = TypeVar("Answer", bound=BaseModel)


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
            return answer_type.model_validate_json(completion.text), total
        except ValidationError as error:
            problem = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}" for e in error.errors()[:3])
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
