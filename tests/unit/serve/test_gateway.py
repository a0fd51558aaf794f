"""The gateway over real HTTP semantics (ASGI), with a model of a few lines behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from janus_ray.config import validate
from janus_ray.records import Preference
from janus_ray.serve.gateway import Api, Item, Overloaded, Unavailable
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.serve.verbalise import system_sha, verbalise

USER = {"role": "user", "content": "Hello?"}
PERSONA = {"name": "P", "preferences": ["a", "b", "c", "d"]}


class Echo:
    """Answers with the request it was given."""

    def __init__(self, failure: Exception | None = None, fails_after: int = 0) -> None:
        self.failure, self.fails_after, self.closed = failure, fails_after, False
        self.bodies: list[dict] = []

    async def chat(self, body: dict) -> AsyncIterator[Item]:
        self.bodies.append(body)
        try:
            if self.failure and not self.fails_after:
                raise self.failure
            if not body.get("stream"):
                yield {"choices": [{"message": {"content": json.dumps(body["messages"])}}]}
                return
            for index in range(3):
                if self.failure and index == self.fails_after:
                    raise self.failure
                yield [f'data: {{"index": {index}}}\n\n']
                await asyncio.sleep(0)
            yield ["data: [DONE]\n\n"]
        finally:
            self.closed = True


class Answers(Echo):
    """Answers with one given item."""

    def __init__(self, item: dict) -> None:
        super().__init__()
        self.item = item

    async def chat(self, body: dict) -> AsyncIterator[Item]:
        yield self.item


@pytest.fixture
def gateway():
    counted: list[tuple] = []

    def make(backend=None, *, ready=("m", "other"), **fields) -> httpx.AsyncClient:
        models = [{"model_id": "m", "path": "x"}, {"model_id": "other", "path": "x"}]
        recipe = validate(ServeRecipe, {"models": models, "personas": [PERSONA], **fields}, "test")
        backends = {"m": backend or Echo(), "other": Echo()}
        app = Api(recipe, backends, set(ready), lambda *row: counted.append(row[:3])).app()
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        client.counted = counted
        return client

    return make


async def ask(client: httpx.AsyncClient, **body) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": "m", "messages": [USER], **body})


def refusal(response: httpx.Response) -> dict:
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert "\n" not in error["message"]
    return error


async def test_preferences_and_the_equal_system_message_reach_the_engine_alike(gateway):
    values = [
        {"dimension": "harmlessness", "description": "Name risks."},
        {"dimension": "style", "subdimension": "tone", "preference": "warm", "description": "Be warm."},
    ]
    system = verbalise(
        [Preference("style", "tone", "warm", "Be warm."), Preference("harmlessness", "", "", "Name risks.")]
    )
    echo = Echo()
    client = gateway(echo)
    stated = await ask(client, janus={"preferences": values})
    given = await ask(client, messages=[{"role": "system", "content": system}, USER])
    assert echo.bodies[0] == echo.bodies[1]
    assert echo.bodies[0]["messages"] == [{"role": "system", "content": system}, USER]
    assert stated.headers["x-janus-system-sha"] == given.headers["x-janus-system-sha"] == system_sha(system)
    preview = await client.post("/v1/janus/preview", json={"preferences": values})
    assert preview.json() == {"system": system, "sha": system_sha(system)}


async def test_without_values_there_is_no_system_message(gateway):
    echo = Echo()
    for messages in ([USER], [{"role": "system", "content": ""}, USER]):
        response = await ask(gateway(echo), messages=messages)
        assert "x-janus-system-sha" not in response.headers
    assert [body["messages"] for body in echo.bodies] == [[USER], [USER]]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"cache_salt": "x"}, "cache_salt", "unknown parameter"),
        ({"priority": 1}, "priority", "unknown parameter"),
        ({"vllm_xargs": {}}, "vllm_xargs", "unknown parameter"),
        ({"chat_template": "x"}, "chat_template", "unknown parameter"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", "unknown parameter"),
        ({"tools": []}, "tools", "unknown parameter"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 2049}, "max_tokens", "more than this server allows"),
        ({"max_completion_tokens": 2049}, "max_completion_tokens", "more than this server allows"),
        ({"n": 5}, "n", "more than this server allows"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [USER, USER]}, "messages.1.role", "'assistant' is due"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages", "must be the user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}, None, "text"),
        ({"janus": {"preferences": []}}, "janus.preferences", "at least 1"),
        ({"janus": {"preferences": ["  "]}}, None, ""),
        ({"janus": {"preferences": [{"dimension": "style"}]}}, None, ""),
        ({"janus": {"values": []}}, "janus.preferences", "is required"),
        (
            {"janus": {"preferences": ["x"]}, "messages": [{"role": "system", "content": "y"}, USER]},
            "janus",
            "one of them",
        ),
    ],
)
async def test_a_bad_field_is_named(gateway, body, param, words):
    echo = Echo()
    response = await ask(gateway(echo), **body)
    assert response.status_code == 400
    error = refusal(response)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param:
        assert error["param"] == param and param in error["message"]
    assert echo.bodies == []


async def test_openai_parameters_and_the_four_extra_ones_pass(gateway):
    echo = Echo()
    passed = {"temperature": 0, "top_p": 0.5, "n": 2, "seed": 1, "stop": ["x"], "max_tokens": 5, "logprobs": True}
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}
    assert (await ask(gateway(echo), **passed, **extra, user="somebody")).status_code == 200
    assert echo.bodies == [{"model": "m", "messages": [USER], **passed, **extra}]


async def test_other_refusals_have_the_same_shape(gateway):
    client = gateway(max_body_kib=1)
    cases = [
        (await client.post("/v1/chat/completions", content=b"{nonsense"), 400),
        (await client.post("/v1/chat/completions", content=b""), 400),
        (await client.post("/v1/chat/completions", content=b"x" * 2000), 413),
        (await ask(client, model="absent"), 404),
        (await client.get("/v1/embeddings"), 404),
        (await client.get("/docs"), 404),
        (await client.get("/page/../gateway.py"), 404),
        (await client.get("/page/index.html"), 404),
        (await client.get("/v1/chat/completions"), 405),
        (await client.post("/v1/janus/preview", json={"preferences": "x"}), 400),
    ]
    for response, status in cases:
        assert response.status_code == status, response.text
        refusal(response)
    assert "there is m, other" in (await ask(client, model="absent")).text


@pytest.mark.parametrize(("failure", "status"), [(Overloaded(), 429), (Unavailable(), 503)])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_busy_or_lost_model_asks_to_come_back(gateway, failure, status, stream):
    client = gateway(Echo(failure), retry_after_s=7)
    response = await ask(client, stream=stream)
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    refusal(response)
    assert client.counted == [("m", status, "stream" if stream else "plain")]


async def test_the_engines_refusal_is_passed_on_and_its_failure_hidden(gateway):
    refused = await ask(gateway(Answers({"error": {"message": "too long", "code": 400, "param": "messages"}})))
    assert (refused.status_code, refusal(refused)["message"]) == (400, "too long")
    failed = await ask(gateway(Answers({"error": {"message": "secret path", "code": 500}})))
    assert failed.status_code == 500 and "secret" not in failed.text


async def test_a_stream_keeps_its_framing(gateway):
    client = gateway()
    response = await ask(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events == ['data: {"index": 0}', 'data: {"index": 1}', 'data: {"index": 2}', "data: [DONE]", ""]
    assert client.counted == [("m", 200, "stream")]


async def test_a_stream_that_breaks_says_so_and_ends(gateway):
    client = gateway(Echo(Unavailable(), fails_after=1))
    events = (await ask(client, stream=True)).text.split("\n\n")
    assert "error" in json.loads(events[1].removeprefix("data: "))
    assert events[2:] == ["data: [DONE]", ""]
    assert client.counted == [("m", 503, "stream")]


async def test_closing_a_stream_closes_the_engines(gateway):
    from janus_ray.serve.gateway import _events

    echo, statuses = Echo(), []
    items = echo.chat({"stream": True})
    events = _events(await anext(items), items, statuses.append)
    await anext(events)
    await events.aclose()
    assert echo.closed and statuses == [499]


async def test_health_waits_for_every_model(gateway):
    starting = gateway(ready=["other"])
    health = await starting.get("/health")
    assert (health.status_code, health.json()["models"]) == (503, {"m": "starting", "other": "ready"})
    assert (await ask(starting)).status_code == 503
    assert (await ask(starting, model="other")).status_code == 200
    assert (await gateway().get("/health")).status_code == 200


async def test_models_personas_and_page(gateway):
    client = gateway(example_prompts=["Why?"])
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["m", "other"]
    offered = (await client.get("/v1/janus/personas")).json()
    assert offered["example_prompts"] == ["Why?"]
    assert [value["description"] for value in offered["personas"][0]["preferences"]] == ["a", "b", "c", "d"]
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name, kind in (("style.css", "text/css"), ("app.js", "javascript")):
        file = await client.get(f"/page/{name}")
        assert file.status_code == 200 and kind in file.headers["content-type"]
        assert f"page/{name}" in page.text
