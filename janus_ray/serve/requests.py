"""What a caller may ask for: the OpenAI chat parameters, allow-listed, with types and ranges.

Everything that is not named here is refused with its name, rather than passed on to the engine: an engine takes
parameters that are not the caller's business (`cache_salt`, `priority`, `chat_template`, `vllm_xargs`, ...), and a
parameter that is dropped in silence is worse than an error. Beyond OpenAI's own there are the usual four of open
models (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`; the last for load tests) and `janus`. A few of OpenAI's
say where a request belongs and not what to answer: they are taken, and the answer's header names them as ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from janus_ray.serve.bodies import read_object
from janus_ray.serve.messages import system_and_turns
from janus_ray.serve.recipe import GivenValue, ServeRecipe
from janus_ray.serve.refusals import ApiError, wrong_field
from janus_ray.text import is_blank
from janus_ray.values.wording import verbalise

# They cannot change an answer here.
IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
# They would change it. Some have a value that says what happens anyway.
_UNSUPPORTED: dict[str, Any] = {
    "audio": None,
    "function_call": "none",
    "functions": None,
    "modalities": ["text"],
    "moderation": None,
    "reasoning_effort": None,
    "tool_choice": "none",
    "tools": None,
    "verbosity": "medium",
    "web_search_options": None,
}
MAX_STOPS = 16
"""Stop texts of one request; OpenAI takes 4."""
_MAX_TOKEN_ID_DIGITS = 9
_MAX_LOGIT_BIAS = 1024
_INT64 = 2**63

# What a refusal says of a field beside what was wrong with it.
_ALLOWED = {
    "max_tokens": "a whole number from 1",
    "max_completion_tokens": "a whole number from 1",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0, up to 1",
    "n": "a whole number from 1",
    "stop": f"a text or a list of up to {MAX_STOPS} texts, none of them empty",
    "stream": "true or false",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "logit_bias": "an object of token ids (as texts) and numbers from -100 to 100",
    "logprobs": "true or false",
    "top_logprobs": "a whole number from 0 to 20",
    "seed": "a whole number from -2^63 to 2^63 - 1",
    "top_k": "a whole number from -1 to 1000000",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100",
    "ignore_eos": "true or false",
}

# Where pydantic's own words speak of Python.
_PROBLEMS = {
    "extra_forbidden": "unknown parameter",
    "missing": "is required",
    "model_type": "should be an object",
    "dict_type": "should be an object",
    "list_type": "should be a list",
    "string_type": "should be a text",
    "string_too_short": "should not be empty",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "less_than": "is too large",
    "too_long": "has too many entries",
    "too_short": "should have at least 1 entry",
}


class _Body(BaseModel):
    # Strict: "0.5" and true are no temperatures.
    model_config = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """5.0 is a whole number; JSON does not tell the two apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seen(text: str) -> str:
    if is_blank(text):
        raise ValueError("should not be empty")
    return text


_Sentence = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000), AfterValidator(_seen)]
_Whole = Annotated[int, BeforeValidator(_whole)]
_Stop = Annotated[str, StringConstraints(min_length=1)]


class _Janus(_Body):
    preferences: Annotated[list[_Sentence | GivenValue], Field(min_length=1, max_length=32)]


class _StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    # Padding against eavesdroppers who count bytes; it does not change the answer.
    include_obfuscation: bool = False


class _JsonSchema(_Body):
    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class _ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


_AnyBody = TypeVar("_AnyBody", bound=_Body)


class ChatBody(_Body):
    """The body of POST /v1/chat/completions, without its messages."""

    model: str
    janus: _Janus | None = None
    max_tokens: _Whole | None = Field(default=None, ge=1)
    max_completion_tokens: _Whole | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: _Whole | None = Field(default=None, ge=1)
    stop: Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=_MAX_LOGIT_BIAS
    )
    logprobs: bool | None = None
    top_logprobs: _Whole | None = Field(default=None, ge=0, le=20)
    seed: _Whole | None = Field(default=None, ge=-_INT64, lt=_INT64)
    response_format: _ResponseFormat | None = None
    top_k: _Whole | None = Field(default=None, ge=-1, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    ignore_eos: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        for key in bias:
            # One spelling for each id, so that none can be given twice.
            if not (key.isascii() and key.isdigit() and len(key) <= _MAX_TOKEN_ID_DIGITS and str(int(key)) == key):
                raise ValueError(f"{key[:40]!r} is not a token id")
        return bias


class PreviewBody(_Body):
    """The body of POST /v1/janus/preview."""

    preferences: Annotated[list[_Sentence | GivenValue], Field(min_length=1, max_length=32)]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request that has passed: what goes to the engine, the system message it was given, and what was ignored."""

    model: str
    system: str | None
    stream: bool
    body: dict[str, Any]
    ignored: tuple[str, ...] = ()


def parse_chat(raw: bytes, recipe: ServeRecipe, content_type: str | None = None) -> EngineRequest:
    """Checks the body of a chat request and prepares it for the engine.

    Raises:
        ApiError: 400 with the field's path, 404 for an unknown model.
    """
    given = _without_nulls(read_object(raw, content_type))
    ignored = tuple(name for name in IGNORED if name in given)
    _refuse_unsupported(given)
    chat = _validate(ChatBody, _parameters(given))
    if "messages" not in given:
        raise wrong_field("messages", "is required", "missing")
    known = [model.model_id for model in recipe.models]
    if chat.model not in known:
        raise unknown_model(chat.model, known)
    _check_caps(chat, recipe)
    _check_pairs(chat)
    system, turns = system_and_turns(given["messages"])
    if chat.janus and system:
        raise ApiError(
            400,
            "janus.preferences and a system message both state values; give one of them",
            param="janus",
            code="both",
        )
    if chat.janus:
        system = verbalise(chat.janus.preferences)
    messages = ([{"role": "system", "content": system}] if system else []) + turns
    return EngineRequest(chat.model, system or None, bool(chat.stream), _engine_body(chat, messages), ignored)


def parse_preview(raw: bytes, content_type: str | None = None) -> str:
    """The system message for the values in the body of a preview request.

    Raises:
        ApiError: 400 with the field's path.
    """
    given = _without_nulls(read_object(raw, content_type))
    return verbalise(_validate(PreviewBody, given).preferences)


def unknown_model(name: str, known: list[str]) -> ApiError:
    """The refusal of a model that is not served here."""
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    return ApiError(
        404, f"model {shown!r} does not exist; there is {', '.join(known)}", param="model", code="model_not_found"
    )


def _without_nulls(value: Any) -> Any:
    """A field that is null counts as absent; inside messages and schemas others decide that."""
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {name: inner for name, inner in value.items() if inner is not None}
    return {name: inner if name in ("messages", "schema") else _without_nulls(inner) for name, inner in kept.items()}


def _parameters(given: dict[str, Any]) -> dict[str, Any]:
    left_out = {"messages", *IGNORED, *_UNSUPPORTED}
    return {name: value for name, value in given.items() if name not in left_out}


def _refuse_unsupported(given: dict[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if name in given and (harmless is None or given[name] != harmless):
            raise wrong_field(name, "unknown parameter (OpenAI's, but not supported here)", "unsupported")


def _engine_body(chat: ChatBody, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = chat.model_dump(exclude_none=True, by_alias=True, exclude={"janus", "stream_options", "response_format"})
    if chat.stream_options:
        body["stream_options"] = chat.stream_options.model_dump(exclude={"include_obfuscation"}, exclude_unset=True)
    if chat.response_format and chat.response_format.type != "text":
        body["response_format"] = chat.response_format.model_dump(exclude_none=True, by_alias=True)
        if chat.response_format.json_schema:
            # As it came: null is a value inside a schema.
            body["response_format"]["json_schema"]["schema"] = chat.response_format.json_schema.json_schema
    if not chat.stop:
        body.pop("stop", None)
    if chat.seed == -1:
        # The engine takes -1 for "no seed".
        body["seed"] = _INT64 - 1
    body["messages"] = messages
    return body


def _validate(body_type: type[_AnyBody], given: dict[str, Any]) -> _AnyBody:
    try:
        return body_type.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of the alternatives of a union, the one that fitted furthest is the one that was meant.
        first = max(errors, key=lambda one: len(one["loc"]))
    *outer, last = first["loc"]
    unknown = first["type"] == "extra_forbidden"
    path = [str(part) for part in outer if not _is_branch(part)]
    path += [str(last)] if unknown or not _is_branch(last) else []
    problem = _PROBLEMS.get(first["type"]) or first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    allowed = None if unknown or not path else _ALLOWED.get(path[0])
    raise wrong_field(".".join(path), f"{problem}; allowed: {allowed}" if allowed else problem, first["type"])


def _is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's path names an alternative of a union instead of a field."""
    return isinstance(part, str) and ("[" in part or part in {"str", "GivenValue", "constrained-str"})


def _check_caps(chat: ChatBody, recipe: ServeRecipe) -> None:
    for name, value, most in (
        ("max_tokens", chat.max_tokens, recipe.max_tokens),
        ("max_completion_tokens", chat.max_completion_tokens, recipe.max_tokens),
        ("n", chat.n, recipe.max_choices),
    ):
        if value is not None and value > most:
            raise wrong_field(name, f"{value} is more than this server allows ({most})", "too_large")


def _check_pairs(chat: ChatBody) -> None:
    """Fields that mean something only beside another."""
    if chat.stream_options and not chat.stream:
        raise wrong_field("stream_options", "applies only with stream: true", "needs_stream")
    if chat.top_logprobs and not chat.logprobs:
        raise wrong_field("top_logprobs", "applies only with logprobs: true", "needs_logprobs")
    most, older = chat.max_completion_tokens, chat.max_tokens
    if most is not None and older is not None and most != older:
        raise wrong_field("max_tokens", "differs from max_completion_tokens; give one of them", "both")
    form = chat.response_format
    if form and (form.type == "json_schema") != (form.json_schema is not None):
        problem = "is required" if form.type == "json_schema" else "applies only with type json_schema"
        raise wrong_field("response_format.json_schema", problem, "missing")
