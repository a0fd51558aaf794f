"""An engine's answer, checked: what the engine passes over in silence would reach the caller as an empty answer.

It ends the stream of a request whose schema it cannot compile as if that had been answered, without a reason and
without an error, and what answers to a schema that nothing satisfies is nothing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from janus_ray.serve.engine_errors import refusal

Item = dict[str, Any] | list[str]

# In events as the engine writes them, without spaces. A text cannot hold these: its quotes are escaped.
_ENDS = '"finish_reason":"'
_STOPS = f'{_ENDS}stop"'
_SAYS = re.compile(r'"content":"(?!")')
_DONE = "data: [DONE]"


async def whole(items: AsyncIterator[Item], body: Mapping[str, Any]) -> AsyncGenerator[Item]:
    """Passes an answer on, with an error in the place of one that is not whole.

    The head of a stream waits for the first text, which comes with it, so that a failure before that is the only item.

    Args:
        items: a completion or an error, or lists of server-sent events.
        body: the request.
    """
    choices, form = body.get("n") or 1, "response_format" in body
    held: list[str] = []
    ended, said, stopped = 0, False, False
    async for item in items:
        if isinstance(item, dict):
            yield unfollowed() if form and not said and _is_nothing(item) else item
            if "error" in item:
                return
            continue
        held += item
        done = any(event.startswith(_DONE) for event in item)
        ended += sum(_ENDS in event for event in item)
        said = said or any(_SAYS.search(event) for event in item)
        stopped = stopped or any(_STOPS in event for event in item)
        if done and (ended < choices or (form and stopped and not said)):
            yield unfollowed() if form and not said else refusal("", 500)
            return
        if said or done:
            yield held
            held = []
    if held:
        yield held


def unfollowed() -> dict[str, Any]:
    """The refusal of a schema that only the engine's compiler found wrong, in a process that does not tell why."""
    return refusal("response_format: nothing can be written that follows this schema", 400, "response_format")


def _is_nothing(item: Mapping[str, Any]) -> bool:
    """Whether a failure of the engine's or a completion without a text."""
    if "error" in item:
        return item["error"]["code"] == 500
    return any(
        choice.get("finish_reason") == "stop" and not choice["message"].get("content") for choice in item["choices"]
    )
