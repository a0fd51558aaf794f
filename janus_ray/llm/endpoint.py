"""The recipe section that describes an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from janus_ray.config import OPERATIONAL, Recipe
from janus_ray.env import MINIATURE_URL
from janus_ray.errors import ConfigError
from janus_ray.provider import provider_url

Parameter = Literal["temperature", "top_p", "max_tokens", "seed", "repetition_penalty"]


def model_id(value: str) -> str:
    """The id, if it is one that a request can name and a line can show.

    Raises:
        ValueError: it is not.
    """
    if value != value.strip() or not value.isprintable():
        raise ValueError("must be without spaces around it or control characters")
    return value


def _checked_url(value: str) -> str:
    """The URL as requests are sent to it.

    Raises:
        ValueError: it is none; the message shows nothing of it.
    """
    value = value.strip()
    if not re.match(r"https?://", value, flags=re.IGNORECASE):
        raise ValueError('must start with http:// or https://; provider = "miniature" names the miniature')
    try:
        parts = urlsplit(value)
        usable = parts.hostname and parts.port != 0 and not re.search(r"[?#\\\s\x00-\x1f]", value)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("is not a URL with a host, a numeric port and no query")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user or a password: recipes are stored; name a key in api_key_env")
    value = value.rstrip("/")
    if value.endswith(("/chat/completions", "/completions", "/models")):
        raise ValueError("must end before /chat/completions: the requests' own path is added to it")
    return value


class Endpoint(Recipe):
    """One OpenAI-compatible endpoint: where it is, which model, and how hard it may be driven."""

    provider: Literal["openai", "miniature"] = "openai"
    """Who answers: "openai" is any server that speaks OpenAI's protocol; "miniature" is the closed world's teacher and
    judge, which the job starts unless `base_url` or JANUS_MINIATURE_URL says where they answer."""
    base_url: str = Field(default="", validate_default=True)
    """URL up to and including /v1. Only the miniature can do without."""
    model: str = Field(min_length=1)
    """Model id, as the endpoint knows it."""
    omit: tuple[Parameter, ...] = ()
    """Parameters that are never sent, so that the endpoint's own defaults hold: some models refuse `temperature`, some
    servers know no `seed`."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", json_schema_extra=OPERATIONAL
    )
    """How the endpoint calls the limit on an answer's length: OpenAI's newer models take "max_completion_tokens"."""
    api_key_env: str | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Environment variable that holds the key; None for an endpoint without one. The key itself is never stored."""
    max_concurrency: int = Field(default=64, ge=1, le=1000, json_schema_extra=OPERATIONAL)
    """Requests in flight at once, over all clients of this endpoint in the job."""
    timeout_s: float = Field(default=120.0, gt=0, le=86_400, json_schema_extra=OPERATIONAL)
    """Seconds one attempt may take, first byte to last."""
    max_attempts: int = Field(default=6, ge=1, le=20, json_schema_extra=OPERATIONAL)
    """Attempts per request when the connection or the server fails. A 429 does not count as one."""
    max_wait_s: float = Field(default=600.0, gt=0, le=86_400, json_schema_extra=OPERATIONAL)
    """Seconds a request may spend waiting because the endpoint says so (429, Retry-After) before it becomes a failed
    row."""
    give_up_after_s: float = Field(default=120.0, gt=0, le=86_400, json_schema_extra=OPERATIONAL)
    """Seconds without a single success, failures only, after which the endpoint counts as down and the remaining
    requests fail at once. A rerun with --if-exists resume asks only for what is missing."""

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str, info: ValidationInfo) -> str:
        if value:
            return _checked_url(value)
        if info.data.get("provider") == "openai":
            raise PydanticCustomError("missing", "is required")
        return value

    @field_validator("model")
    @classmethod
    def _is_an_id(cls, value: str) -> str:
        return model_id(value)

    @field_validator("omit")
    @classmethod
    def _in_one_order(cls, value: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
        # Equal sets are equal recipes.
        return tuple(sorted(set(value)))

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("must be the name of an environment variable (letters, digits, _), never the key itself")
        return value

    @property
    def url(self) -> str:
        """Where to send requests.

        Raises:
            ConfigError: the provider runs nowhere that we know of.
        """
        if self.base_url:
            return self.base_url
        url = provider_url(self.provider)
        try:
            return _checked_url(url)
        except ValueError as error:
            raise ConfigError(f"{MINIATURE_URL}: {error}") from None

    @property
    def address(self) -> str:
        """The endpoint as its recipe names it."""
        return self.base_url or self.provider

    @property
    def identity(self) -> str:
        """What tells this endpoint's answers from another's in the ledger: its host and path.

        Not the port and not the scheme: the same server comes back on another port and answers the same.
        """
        parts = urlsplit(self.base_url)
        return f"{parts.hostname}{parts.path}" if parts.hostname else self.provider

    def reached(self, weights_id: str | None = None) -> ReachedEndpoint:
        """The same endpoint with what a job found out about it, for every process that asks it."""
        return ReachedEndpoint.model_validate(self.model_dump() | {"served_at": self.url, "weights_id": weights_id})


class ReachedEndpoint(Endpoint):
    """An endpoint as a job uses it. No recipe holds one: these facts are found out, not stated."""

    served_at: str = ""
    """Where the endpoint answers now; left empty, as for any endpoint."""
    weights_id: str | None = None
    """Content hash of the weights behind the model's name, where the endpoint tells it (ours does)."""

    @property
    def url(self) -> str:
        """Where to send requests."""
        return self.served_at or super().url

    @property
    def identity(self) -> str:
        """The weights where they are known: whatever else serves them answers the same."""
        return f"weights {self.weights_id}" if self.weights_id else super().identity
