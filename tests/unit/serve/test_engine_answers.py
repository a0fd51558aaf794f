"""What an engine answers, as `vllm serve` words it, and what of it goes on."""

from __future__ import annotations

import pytest

from janus_ray.serve.engine_answers import unfollowed, whole
from janus_ray.serve.engine_errors import refusal

FORM = {"response_format": {"type": "json_object"}}
HEAD = 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TEXT = r'data: {"choices":[{"index":0,"delta":{"content":"\"finish_reason\":\"x"},"finish_reason":null}]}' + "\n\n"
STOP = 'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
DONE = "data: [DONE]\n\n"
FAILURE = refusal("", 500)


def completion(*texts):
    return {"choices": [{"message": {"content": text} if text else {}, "finish_reason": "stop"} for text in texts]}


async def passed_on(items, **body):
    async def given():
        for item in items:
            yield item

    return [item async for item in whole(given(), body)]


@pytest.mark.parametrize(
    ("items", "body", "expected"),
    [
        ([[HEAD], [TEXT], [STOP], [DONE]], {}, [[HEAD, TEXT], [STOP], [DONE]]),
        ([[HEAD], [TEXT], [STOP, DONE]], FORM, [[HEAD, TEXT], [STOP, DONE]]),
        ([[HEAD], [STOP], [DONE]], {}, [[HEAD, STOP, DONE]]),
        ([[HEAD], [DONE]], {}, [FAILURE]),
        ([[HEAD], [DONE]], FORM, [unfollowed()]),
        ([[HEAD], [STOP], [DONE]], FORM, [unfollowed()]),
        ([[HEAD], [STOP.replace("stop", "length")], [DONE]], FORM, [[HEAD, STOP.replace("stop", "length"), DONE]]),
        ([[HEAD], FAILURE, [DONE]], FORM, [unfollowed()]),
        ([[HEAD], FAILURE, [DONE]], {}, [FAILURE]),
        ([[HEAD], [TEXT], FAILURE], FORM, [[HEAD, TEXT], FAILURE]),
        ([[HEAD], [TEXT], [DONE]], FORM, [[HEAD, TEXT], FAILURE]),
        ([[HEAD], [HEAD], [TEXT], [STOP], [DONE]], {"n": 2}, [[HEAD, HEAD, TEXT], [STOP], FAILURE]),
        ([[HEAD]], {}, [[HEAD]]),
        ([completion("{}")], FORM, [completion("{}")]),
        ([completion("")], {}, [completion("")]),
        ([completion("")], FORM, [unfollowed()]),
        ([refusal("too long", 400)], FORM, [refusal("too long", 400)]),
        ([refusal("", 503)], FORM, [refusal("", 503)]),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(items, body, expected):
    assert await passed_on(items, **body) == expected


def test_a_schema_that_cannot_be_followed_is_the_callers_mistake():
    assert unfollowed()["error"]["code"] == 400 and unfollowed()["error"]["param"] == "response_format"
