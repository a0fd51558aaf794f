"""Looking at an endpoint before any work starts: does it answer, take the key, and know the model?"""

from __future__ import annotations

from typing import Any

import httpx2
import openai

from janus_ray.env import api_key
from janus_ray.errors import ConfigError
from janus_ray.llm.answer import read_answer
from janus_ray.llm.client import TRANSPORT_ERRORS, chat_body, http_client, why
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.faults import fault_message, kind_of, parsed
from janus_ray.llm.request import LLMRequest, Sampling
from janus_ray.text import one_line, well_formed

_LIST_TIMEOUT_S, _REQUEST_TIMEOUT_S = 15.0, 60.0
# Enough for models that refuse a smaller limit.
_TRIAL = LLMRequest("check", ({"role": "user", "content": "Hello"},), Sampling(max_tokens=16))


def check_endpoint(endpoint: Endpoint, role: str) -> str | None:
    """Asks the endpoint for its models, and where that does not settle it, the model for one short answer.

    The list is no whitelist: servers leave models out of it, spell them with a tag or a prefix, or have no list. Where
    the model does not stand in it, one real request decides. An endpoint that is merely busy (429, 5xx) passes: the
    retries are there for it.

    Args:
        endpoint: where to ask.
        role: what it is for, said in the error.

    Returns:
        The id of the weights behind the model's name, where the endpoint tells it (our own does).

    Raises:
        ConfigError: it does not answer, rejects the key, or does not have the model.
    """
    client = openai.OpenAI(
        base_url=endpoint.url,
        api_key=api_key(endpoint.api_key_env),
        max_retries=0,
        http_client=http_client(openai.DefaultHttpxClient, endpoint),
    )
    with client:
        try:
            response = client.get(
                "/models", cast_to=httpx2.Response, options={"timeout": min(_LIST_TIMEOUT_S, endpoint.timeout_s)}
            )
            listed = listed_models(response.content)
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise _key_rejected(endpoint, role) from None
            if error.status_code == 429 or error.status_code >= 500:
                return None
            listed = None
        except openai.APITimeoutError:
            raise ConfigError(f"{role}: {endpoint.url} does not answer in time") from None
        except TRANSPORT_ERRORS as error:
            raise ConfigError(f"{role}: {endpoint.url} cannot be reached ({one_line(why(error))})") from None
        if listed is None or endpoint.model not in listed:
            _try_one_request(client, endpoint, role, listed)
    return (listed or {}).get(endpoint.model)


def listed_models(content: bytes) -> dict[str, str | None] | None:
    """Model ids and the ids of their weights, from any of the shapes in which servers list them; None for no list."""
    body = parsed(content)
    entries = body
    if isinstance(body, dict):
        entries = next((body[name] for name in ("data", "models") if isinstance(body.get(name), list)), None)
    if not isinstance(entries, list):
        return None
    models: dict[str, str | None] = {}
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {"id": entry}
        name = well_formed(
            next((fields[key] for key in ("id", "name", "model") if isinstance(fields.get(key), str)), "")
        )
        weights_id = fields.get("weights_id")
        if name:
            models[name] = well_formed(weights_id) if isinstance(weights_id, str) and weights_id else None
    return models


def _try_one_request(
    client: openai.OpenAI, endpoint: Endpoint, role: str, listed: dict[str, str | None] | None
) -> None:
    """Asks a model that the list does not name for one answer.

    Raises:
        ConfigError: the endpoint does not have it, or is no chat endpoint at all.
    """
    timeout_s = min(_REQUEST_TIMEOUT_S, endpoint.timeout_s)
    body = chat_body(endpoint, _TRIAL.without(endpoint.omit))
    try:
        response = client.post("/chat/completions", cast_to=httpx2.Response, body=body, options={"timeout": timeout_s})
    except openai.APIStatusError as error:
        fault = parsed(error.response.content)
        _judge(endpoint, role, listed, kind_of(error.status_code, fault), fault_message(error.status_code, fault))
        return
    except TRANSPORT_ERRORS as error:
        _warn(endpoint, role, listed, f"did not answer one request within {timeout_s:g} s ({one_line(why(error))})")
        return
    outcome = read_answer(response.content, keep_truncated=True).outcome
    if outcome.error_kind == "server" and "choices" not in _fields(response.content):
        raise ConfigError(f"{role}: {endpoint.url} does not speak the OpenAI protocol ({outcome.error_message})")
    _judge(endpoint, role, listed, outcome.error_kind, outcome.error_message or "")


def _judge(endpoint: Endpoint, role: str, listed: dict[str, str | None] | None, kind: str | None, message: str) -> None:
    """What one answer says about the model."""
    message = one_line(message)
    if kind == "auth":
        raise _key_rejected(endpoint, role)
    if kind == "quota":
        raise ConfigError(f"{role}: {endpoint.url}: {message}")
    if kind == "bad_request" and listed:
        names = one_line(", ".join(list(listed)[:10]))
        raise ConfigError(
            f"{role}: {endpoint.url} has no model {endpoint.model!r}; it has: {names} (one request: {message})"
        )
    if kind == "bad_request":
        raise ConfigError(
            f"{role}: {endpoint.url} lists no models and refuses a request to {endpoint.model!r} ({message}); "
            "check base_url and model"
        )
    _warn(endpoint, role, listed, "answers one request" if kind is None else f"answers one request with: {message}")


def _warn(endpoint: Endpoint, role: str, listed: dict[str, str | None] | None, found: str) -> None:
    """Says that the name was not in the list; an endpoint without a list is nothing to speak of."""
    if listed:
        names = one_line(", ".join(list(listed)[:3]))
        print(f"warning: {role}: {endpoint.url} lists {names}, not {endpoint.model!r}; it {found}", flush=True)


def _key_rejected(endpoint: Endpoint, role: str) -> ConfigError:
    source = f"the key in {endpoint.api_key_env}" if endpoint.api_key_env else "a request without a key"
    return ConfigError(f"{role}: {endpoint.url} rejects {source}")


def _fields(content: bytes) -> dict[str, Any]:
    body = parsed(content)
    return body if isinstance(body, dict) else {}
