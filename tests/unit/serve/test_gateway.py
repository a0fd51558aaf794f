"""The gateway over real HTTP semantics (ASGI), with a model of a few lines behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from janus_ray.config import validate
from janus_ray.serve.gateway import Api, Item, Overloaded, Unavailable
from janus_ray.serve.readiness import Readiness
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.serve.requests import ChatBody
from janus_ray.values.value import Value
from janus_ray.values.wording import system_sha, verbalise

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

    def make(backend=None, *, ready=None, **fields) -> httpx.AsyncClient:
        models = [{"model_id": "m", "path": "x"}, {"model_id": "other", "path": "x"}]
        recipe = validate(ServeRecipe, {"models": models, "personas": [PERSONA], **fields}, "test")
        backends = {model.model_id: Echo() for model in recipe.models} | {"m": backend or Echo()}
        readiness = Readiness(backends)
        for name in backends if ready is None else ready:
            readiness.mark_ready(name, f"weights of {name}")
        api = Api(recipe, backends, readiness, lambda *row: counted.append(row[:3]))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(api.app()), base_url="http://test")
        client.counted, client.readiness, client.api = counted, readiness, api
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
    system = verbalise([Value(**value) for value in reversed(values)])
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
    blank = [
        [{"role": role, "content": text}, USER] for role in ("system", "developer") for text in ("", " \n", "\u200b")
    ]
    for messages in ([USER], *blank):
        response = await ask(gateway(echo), messages=messages)
        assert "x-janus-system-sha" not in response.headers
    assert [body["messages"] for body in echo.bodies] == [[USER]] * 7
    stated = await ask(gateway(echo), messages=blank[1], janus={"preferences": ["Be warm."]})
    assert stated.headers["x-janus-system-sha"] == system_sha(verbalise(["Be warm."]))


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
        ({"janus": {"preferences": ["  "]}}, "janus.preferences.0", "not be empty"),
        ({"janus": {"preferences": ["\u200b\u3164"]}}, "janus.preferences.0", "not be empty"),
        (
            {"janus": {"preferences": [{"dimension": "style", "description": "\u200b"}]}},
            "janus.preferences.0.description",
            "must not be blank",
        ),
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


_bodies = st.binary(max_size=40) | st.builds(
    lambda fields, cut, swap: json.dumps({"model": "m", "messages": [USER], **fields}).encode()[cut:].replace(*swap),
    st.dictionaries(
        st.sampled_from(["model", "messages", "stream", "temperature", "stop", "janus", "seed", "x"]),
        st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=4),
        max_size=3,
    ),
    st.sampled_from([0, 0, 0, 1, 9]),
    st.sampled_from([(b"", b"", 0), (b'"m"', b"1e999"), (b"Hello", b"\xff"), (b":", b":["), (b"Hello", b"\\ud800")]),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(raw=_bodies, content_type=st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_whatever_comes_in_a_refusal_or_an_answer_goes_out(gateway, raw, content_type):
    echo = Echo()
    headers = {} if content_type is None else {"content-type": content_type}

    async def send() -> list[httpx.Response]:
        client = gateway(echo)
        return [
            await client.post(path, content=raw, headers=headers)
            for path in ("/v1/chat/completions", "/v1/janus/preview")
        ]

    chat, preview = asyncio.run(send())
    for response in (chat, preview):
        if response.status_code != 200:
            assert 400 <= response.status_code < 500
            refusal(response)
    assert len(echo.bodies) == (chat.status_code == 200)
    assert all(set(body) <= set(ChatBody.model_fields) | {"messages"} and "janus" not in body for body in echo.bodies)


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
    two = [{"model_id": "m", "path": "x", "min_replicas": 2, "max_replicas": 2}]
    client = gateway(Echo(failure), retry_after_s=7, models=two)
    response = await ask(client, stream=stream)
    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    refusal(response)
    assert client.counted == [("m", status, "stream" if stream else "plain")]


async def test_the_only_replica_is_back_after_a_start(gateway):
    client = gateway(Echo(Unavailable()), retry_after_s=7)
    # The model of this test was ready at once.
    assert (await ask(client)).headers["retry-after"] == "1"


async def test_the_engines_refusal_is_passed_on_and_its_failure_hidden(gateway):
    refused = await ask(gateway(Answers({"error": {"message": "too long", "code": 400, "param": "messages"}})))
    assert (refused.status_code, refusal(refused)["message"]) == (400, "too long")
    failed = await ask(gateway(Answers({"error": {"message": "secret path", "code": 500}})))
    assert failed.status_code == 500 and "secret" not in failed.text
    dead = await ask(gateway(Answers({"error": {"message": "secret path", "code": 503}})), stream=True)
    assert (dead.status_code, refusal(dead)["code"]) == (503, "unavailable") and "secret" not in dead.text
    streamed = await ask(gateway(Answers({"error": {"message": "too long", "code": 400}})), stream=True)
    assert streamed.status_code == 400 and streamed.headers["content-type"] == "application/json"


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


@pytest.mark.parametrize(("code", "counted"), [(400, 400), (500, 500), (503, 503)])
async def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error(gateway, code, counted):
    class Fails(Echo):
        async def chat(self, body: dict) -> AsyncIterator[Item]:
            yield ['data: {"index": 0}\n\n']
            yield {"error": {"message": "no", "code": code}}
            yield ["data: never\n\n"]

    client = gateway(Fails())
    events = (await ask(client, stream=True)).text.split("\n\n")
    assert events[0] == 'data: {"index": 0}' and events[2:] == ["data: [DONE]", ""]
    assert sorted(json.loads(events[1].removeprefix("data: "))["error"]) == ["code", "message", "param", "type"]
    assert client.counted == [("m", counted, "stream")]


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
    refused = await ask(starting)
    assert (refused.status_code, refusal(refused)["code"]) == (503, "starting")
    assert (await ask(starting, model="other")).status_code == 200
    assert (await gateway().get("/health")).json() == {"status": "ok", "models": {"m": "ready", "other": "ready"}}


class Waits(Echo):
    """Has no replica that could answer."""

    async def chat(self, body: dict) -> AsyncIterator[Item]:
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            self.closed = True


async def test_a_lost_model_is_named_and_nobody_waits_for_it(gateway):
    backend = Waits()
    client = gateway(backend)
    waiting = asyncio.create_task(ask(client, stream=True))
    await asyncio.sleep(0)
    client.readiness.mark_lost("m")
    later = await ask(client)
    for response in (await waiting, later):
        assert (response.status_code, refusal(response)["code"]) == (503, "restarting")
        assert int(response.headers["retry-after"]) >= 1
    await asyncio.sleep(0)
    assert backend.closed
    health = await client.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "restarting", "models": {"m": "restarting", "other": "ready"}}
    assert (await ask(client, model="other")).status_code == 200
    client.readiness.mark_ready("m", "new weights")
    assert (await client.get("/v1/models/m")).json()["weights_id"] == "new weights"
    assert (await client.get("/health")).status_code == 200


async def test_a_server_that_stops_takes_no_more(gateway):
    client = gateway(retry_after_s=7)
    client.readiness.stopping = True
    response = await ask(client)
    assert (response.status_code, refusal(response)["code"], response.headers["retry-after"]) == (503, "stopping", "7")
    assert (await client.get("/health")).json()["status"] == "stopping"


async def test_an_answer_counts_until_its_last_byte(gateway):
    client, seen = gateway(ready=[]), []

    class Seen(Echo):
        async def chat(self, body: dict) -> AsyncIterator[Item]:
            async for item in super().chat(body):
                seen.append(client.api.answering)
                yield item

    client = gateway(Seen())
    await ask(client, stream=True)
    await ask(client, temperature=3)
    await ask(client, model="absent")
    assert seen == [1, 1, 1, 1] and client.api.answering == 0


async def test_models_are_listed_with_their_weights_and_found_by_id(gateway):
    slashed = [{"model_id": "org/m", "path": "x"}, {"model_id": "m", "path": "y"}, {"model_id": "other", "path": "z"}]
    client = gateway(models=slashed)
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(model["id"], model["weights_id"]) for model in listed["data"]] == [
        ("org/m", "weights of org/m"),
        ("m", "weights of m"),
        ("other", "weights of other"),
    ]
    for path in ("/v1/models/org/m", "/v1/models/org%2Fm", "/v1/models/org%2fm"):
        assert (await client.get(path)).json() == listed["data"][0]
    for path in ("/v1/models/org/absent", "/v1/models/org", "/v1/models/"):
        absent = await client.get(path)
        assert absent.status_code == 404 and refusal(absent)["code"] == "model_not_found"
    assert [one["weights_id"] for one in (await gateway(ready=[]).get("/v1/models")).json()["data"]] == [None, None]


async def test_head_is_get_without_the_body(gateway):
    client = gateway()
    for path in ("/health", "/v1/models", "/v1/models/m", "/v1/janus/personas", "/", "/page/app.js"):
        got, headed = await client.get(path), await client.head(path)
        assert headed.status_code == got.status_code == 200
        assert headed.headers["content-type"] == got.headers["content-type"]
        assert headed.headers["content-length"] == got.headers["content-length"]
    assert (await client.head("/v1/models/absent")).status_code == 404
    wrong = await client.delete("/v1/models")
    assert wrong.status_code == 405 and set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_what_was_ignored_stands_in_the_header(gateway):
    client = gateway()
    for stream in (False, True):
        response = await ask(client, stream=stream, store=True, metadata={"a": "b"}, user="somebody")
        assert response.status_code == 200 and response.headers["x-janus-ignored"] == "metadata, store, user"
    assert "x-janus-ignored" not in (await ask(client, user=None)).headers


async def test_models_personas_and_page(gateway):
    client = gateway(example_prompts=["Why?"])
    offered = (await client.get("/v1/janus/personas")).json()
    assert offered["example_prompts"] == ["Why?"]
    assert [value["description"] for value in offered["personas"][0]["preferences"]] == ["a", "b", "c", "d"]
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name, kind in (("style.css", "text/css"), ("app.js", "javascript")):
        file = await client.get(f"/page/{name}")
        assert file.status_code == 200 and kind in file.headers["content-type"]
        assert f"page/{name}" in page.text
