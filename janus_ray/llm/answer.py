"""Reading a chat completion: what a person should see of it, and whether it is finished.

An answer is never taken for more than it is. Only one that its endpoint calls finished is "ok"; thoughts, tool calls
and halves are not answers. A field of an odd type is dropped where nothing hangs on it (usage), and otherwise makes
the answer malformed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from janus_ray.llm.faults import in_snake_case, kind_of, parsed, words_of
from janus_ray.llm.request import Completion, Usage
from janus_ray.llm.thoughts import without_thoughts
from janus_ray.text import is_blank, well_formed

# How servers spell the end of an answer: OpenAI and vLLM, Together, TGI, Anthropic, Cohere and Gemini.
_FINISHED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed"})
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"})
_FILTERED = frozenset(
    {
        "content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii",
        "guardrail_intervened", "error_toxic", "sensitive",
    }
)  # fmt: skip
# The server gave up, not the model: the next attempt may succeed.
_BROKEN_OFF = frozenset(
    {"error", "abort", "aborted", "cancelled", "canceled", "user_cancel", "insufficient_system_resource", "timeout"}
)
_TOOLS = frozenset({"tool_calls", "tool_call", "tool_use", "function_call", "malformed_function_call"})
_REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_THOUGHT_PARTS = frozenset({"thinking", "reasoning", "reasoning_text", "redacted_thinking", "thought"})
# No answer has more tokens than this; a larger number is no count, and would fit no column.
_MOST_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer came to."""

    outcome: Completion
    before_any_text: bool = False
    """The answer was cut before a person would have seen anything: its room went to thoughts."""


class _Malformed(Exception):
    """The answer has not the form of a chat completion."""


def read_answer(content: bytes, *, keep_truncated: bool, max_tokens: int | None = None) -> Reading:
    """Reads the body of an HTTP 200.

    Args:
        content: the body.
        keep_truncated: take a text that was cut at max_tokens as it is.
        max_tokens: the limit that was asked for; tells how an answer ended where the server does not.
    """
    body = parsed(content)
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    try:
        choice, message = _choice(body)
        text, thought, refusal = _content(message)
    except _Malformed:
        shown = words_of(body)
        if isinstance(body, dict) and (body.get("error") or kind_of(200, body) != "server"):
            return Reading(Completion.failure(kind_of(200, body), shown, 0, _usage(body)))
        shown = shown[:160] or "nothing"
        return Reading(Completion.failure("server", f"the answer is not a chat completion: {shown}", 0))
    assert isinstance(body, dict)
    usage = _usage(body)
    reason = _reason(choice)
    if "finish_reason" not in choice:
        # Some servers never say how an answer ended (null says that it has not): the count of tokens tells the limit.
        reason = "length" if max_tokens and usage.completion_tokens >= max_tokens else "stop"
    if refusal:
        return Reading(Completion.failure("refusal", refusal, 0, usage))
    if reason in _FILTERED:
        return Reading(
            Completion.failure("content_filter", "the endpoint's content filter stopped the answer", 0, usage)
        )
    if reason in _BROKEN_OFF:
        return Reading(Completion.failure("server", f"the endpoint broke the answer off ({reason})", 0, usage))
    if reason in _TOOLS or message.get("tool_calls") or message.get("function_call"):
        return Reading(Completion.failure("unfinished", "the answer is a tool call, not a text", 0, usage))
    return _of_text(text, thought, reason, usage, keep_truncated)


def _of_text(text: str, thought: bool, reason: str, usage: Usage, keep_truncated: bool) -> Reading:
    """The outcome of an answer that is text, thoughts in it left out."""
    told = without_thoughts(text)
    shown = told.text.removeprefix("\ufeff")
    has_text = not is_blank(shown) and told.thoughts != "unclear"
    thought = thought or told.thoughts != "none"
    if reason in _CUT:
        if has_text and keep_truncated:
            return Reading(Completion("ok", text=shown, finish_reason="length", usage=usage))
        where = "" if has_text else ", which went to thoughts" if thought else ", before any text"
        return Reading(
            Completion.failure("truncated", f"the answer was cut at max_tokens{where}", 0, usage), not has_text
        )
    if is_blank(shown) and told.thoughts in ("none", "closed"):
        problem = "the answer holds thoughts only" if thought else "the answer is empty"
        return Reading(Completion.failure("empty", problem, 0, usage))
    problem = ""
    if told.thoughts == "open":
        problem = "the answer holds a thought without an end"
    elif told.thoughts == "unclear":
        problem = "thoughts and answer cannot be told apart"
    elif reason not in _FINISHED:
        problem = f"the endpoint does not say that the answer is finished (finish_reason {reason or 'null'})"
    if problem:
        return Reading(Completion.failure("unfinished", problem, 0, usage))
    return Reading(Completion("ok", text=shown, finish_reason="stop", usage=usage))


def _choice(body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice and its message."""
    choices = body.get("choices") if isinstance(body, dict) and not _is_error(body.get("error")) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _Malformed
    if _is_error(choice.get("error")):
        # The body stands for its error from here on.
        body["error"] = choice["error"]
        raise _Malformed
    message = choice.get("message")
    if message is None and choice.keys() >= {"message", "finish_reason"}:
        message = {}
    if not isinstance(message, dict):
        raise _Malformed
    return choice, message


def _is_error(field: Any) -> bool:
    """Whether an error field says anything; some servers send an empty form along."""
    return bool(field) and not (isinstance(field, dict) and not any(field.values()))


def _content(message: dict[str, Any]) -> tuple[str, bool, str]:
    """Text, whether there were thoughts beside it, and the refusal."""
    texts: list[str] = []
    thought = any(message.get(name) for name in _REASONING_FIELDS)
    refusal = message.get("refusal")
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if part is None:
            continue
        if isinstance(kind, str) and kind in _THOUGHT_PARTS:
            thought = True
        elif kind == "refusal":
            refusal = refusal or part.get("refusal") or "refused"
        elif isinstance(text, str) and (kind is None or kind in ("text", "output_text")):
            texts.append(text)
        else:
            raise _Malformed
    words = refusal if isinstance(refusal, str) else words_of(refusal) or ("refused" if refusal else "")
    return well_formed("".join(texts)), thought, words.strip()


def _reason(choice: dict[str, Any]) -> str:
    """The finish reason in the spelling of the sets above; "" for none, or for what is no reason."""
    reason = choice.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    return in_snake_case(well_formed(reason)[:60]).removeprefix("finish_reason_") if isinstance(reason, str) else ""


def _usage(body: dict[str, Any]) -> Usage:
    """Tokens as the endpoint counted them; what is no count is dropped."""
    usage = body.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    return Usage(*(count if type(count) is int and 0 <= count <= _MOST_TOKENS else 0 for count in counts))
