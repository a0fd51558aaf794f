"""What a caller may ask for, and how a refusal looks: the OpenAI chat parameters, allow-listed.

Everything that is not named here is refused with its name, rather than passed on to the engine: an engine takes
parameters that are not the caller's business (`cache_salt`, `priority`, `chat_template`, `vllm_xargs`, ...), and a
parameter that is dropped in silence is worse than an error. Beyond OpenAI's own there are the usual four of open
models (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`; the last for load tests) and `janus`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from janus_ray.records import Preference
from janus_ray.serve.recipe import ServeRecipe, Value
from janus_ray.serve.verbalise import verbalise


class ApiError(Exception):
    """A refusal on its way to the caller."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Takes the HTTP status, one sentence, the request's field, and a code that programs can test."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 429 else _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_TYPES = {429: "rate_limit_error", 503: "service_unavailable"}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Message(_Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[_TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


_Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


class _Janus(_Body):
    preferences: Annotated[list[_Sentence | Value], Field(min_length=1, max_length=32)]


class _StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


_AnyBody = TypeVar("_AnyBody", bound=_Body)


class ChatBody(_Body):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    janus: _Janus | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    ignore_eos: bool | None = None


class PreviewBody(_Body):
    """The body of POST /v1/janus/preview."""

    preferences: Annotated[list[_Sentence | Value], Field(min_length=1, max_length=32)]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request that has passed: what goes to the engine, and the system message it was given."""

    model: str
    system: str | None
    stream: bool
    body: dict[str, Any]


def parse_chat(raw: bytes, recipe: ServeRecipe) -> EngineRequest:
    """Checks the body of a chat request and prepares it for the engine.

    Raises:
        ApiError: 400 with the field's path, 404 for an unknown model.
    """
    chat = _validate(ChatBody, raw)
    known = [model.model_id for model in recipe.models]
    if chat.model not in known:
        raise ApiError(
            404,
            f"model {chat.model!r} does not exist; there is {', '.join(known)}",
            param="model",
            code="model_not_found",
        )
    _check_caps(chat, recipe)
    system, turns = _split(chat)
    body = chat.model_dump(exclude_none=True, exclude={"janus", "messages", "user"})
    body["messages"] = ([{"role": "system", "content": system}] if system else []) + turns
    return EngineRequest(chat.model, system, bool(chat.stream), body)


def parse_preview(raw: bytes) -> str:
    """The system message for the values in the body of a preview request.

    Raises:
        ApiError: 400 with the field's path.
    """
    return verbalise(as_preferences(_validate(PreviewBody, raw).preferences))


def as_preferences(values: list[str | Value] | list[Value]) -> list[Preference | str]:
    """Values of a request or a recipe as records; texts stay texts."""
    return [value if isinstance(value, str) else Preference(**value.model_dump()) for value in values]


def _validate(body_type: type[_AnyBody], raw: bytes) -> _AnyBody:
    try:
        return body_type.model_validate_json(raw or b"null")
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        # Of the alternatives of a union, the one that fitted furthest is the one that was meant.
        first = max(errors, key=lambda one: len(one["loc"]))
        path = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        if first["type"] == "extra_forbidden":
            problem = "unknown parameter"
        elif first["type"] == "missing":
            problem = "is required"
        elif first["type"] == "json_invalid":
            problem = "the body is not valid JSON"
        else:
            problem = first["msg"]
        raise ApiError(400, f"{path}: {problem}" if path else problem, param=path, code=first["type"]) from None


def _is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's path names an alternative of a union instead of a field."""
    return isinstance(part, str) and ("[" in part or part in {"str", "Value", "constrained-str"})


def _check_caps(chat: ChatBody, recipe: ServeRecipe) -> None:
    for name, value, most in (
        ("max_tokens", chat.max_tokens, recipe.max_tokens),
        ("max_completion_tokens", chat.max_completion_tokens, recipe.max_tokens),
        ("n", chat.n, recipe.max_choices),
    ):
        if value is not None and value > most:
            raise ApiError(
                400, f"{name}: {value} is more than this server allows ({most})", param=name, code="too_large"
            )


def _split(chat: ChatBody) -> tuple[str | None, list[dict[str, str]]]:
    """The system message and the turns, in the order that the chat template accepts."""
    first, *rest = chat.messages
    given = first.text() if first.role == "system" else None
    turns = rest if first.role == "system" else chat.messages
    offset = len(chat.messages) - len(turns)
    if chat.janus and given is not None:
        raise ApiError(
            400,
            "janus.preferences and a system message both state values; give one of them",
            param="janus",
            code="both",
        )
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            path = f"messages.{offset + index}.role"
            raise ApiError(400, f"{path}: {message.role!r} where {expected!r} is due", param=path, code="role_order")
    if len(turns) % 2 == 0:
        raise ApiError(400, "messages: the last message must be the user's", param="messages", code="role_order")
    system = verbalise(as_preferences(chat.janus.preferences)) if chat.janus else given
    # An empty system message counts as none, as in training (chat.conversation).
    return system or None, [{"role": message.role, "content": message.text()} for message in turns]
