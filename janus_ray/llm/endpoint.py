"""The recipe section that describes an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from janus_ray.config import OPERATIONAL, Recipe


class Endpoint(Recipe):
    """One OpenAI-compatible endpoint: where it is, which model, and how hard it may be driven."""

    base_url: str
    """URL up to and including /v1, or "miniature" for the teacher and judge that the job starts itself."""
    model: str
    """Model id, as the endpoint lists it."""
    api_key_env: str | None = Field(default=None, json_schema_extra=OPERATIONAL)
    """Environment variable that holds the key; None for an endpoint without one. The key itself is never stored."""
    max_concurrency: int = Field(default=64, ge=1, le=1000, json_schema_extra=OPERATIONAL)
    """Requests in flight at once, over all clients of this endpoint in the job."""
    timeout_s: float = Field(default=120.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds one attempt may take, first byte to last."""
    max_attempts: int = Field(default=6, ge=1, le=20, json_schema_extra=OPERATIONAL)
    """Attempts per request when the connection or the server fails. A 429 does not count as one."""
    max_wait_s: float = Field(default=600.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds a request may spend waiting out 429s before it becomes a failed row."""
    give_up_after_s: float = Field(default=120.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds without a single success, failures only, after which the endpoint counts as down and the remaining
    requests fail at once. A rerun with --if-exists resume asks only for what is missing."""
    served_at: str | None = Field(default=None, repr=False, json_schema_extra=OPERATIONAL)
    """Where the endpoint answers now, when base_url is a name; set by the job, not by people."""

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value != "miniature" and not value.startswith(("http://", "https://")):
            raise ValueError('must start with http:// or https://, or be "miniature"')
        try:
            parts = urlsplit(value)
            usable = value == "miniature" or (parts.hostname and (parts.port or True) and not parts.query)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("is not a URL with a host, a numeric port and no query")
        if "@" in parts.netloc:
            raise ValueError("must not hold a user or a password: recipes are stored; name a key in api_key_env")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("must be the name of an environment variable (letters, digits, _), never the key itself")
        return value

    @property
    def url(self) -> str:
        """Where to send requests."""
        return self.served_at or self.base_url
