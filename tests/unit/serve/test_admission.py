"""What the HTTP proxy refuses by itself, over real HTTP semantics (ASGI)."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from janus_ray.serve.admission import CHAT_PATH, Admission


@pytest.fixture
def proxy():
    """A server with room for three that answers when told to."""
    finish, counted = asyncio.Event(), []

    async def chat(request: Request) -> Response:
        if request.query_params.get("fails"):
            raise RuntimeError("a bug")
        await finish.wait()
        return Response("answer", headers={"X-Janus-Room": "3/7", "X-Other": "kept"})

    async def health(request: Request) -> Response:
        if status := request.query_params.get("serve"):
            return Response("Internal: ray.exceptions.ActorDiedError", int(status))
        status = int(request.query_params.get("gateway", 200))
        return Response("up", status, headers={"X-Janus-Room": "3/7"})

    routes = [Route(CHAT_PATH, chat, methods=["POST"]), Route("/health", health)]
    app = Admission(Starlette(routes=routes), count=lambda: counted.append(1))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    client.finish, client.counted = finish, counted
    return client


async def burst(client: httpx.AsyncClient, size: int) -> list[httpx.Response]:
    asked = [asyncio.create_task(client.post(CHAT_PATH)) for _ in range(size)]
    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert all(task.result().status_code == 429 for task in done)
    client.finish.set()
    return [await task for task in asked]


async def test_what_is_above_the_gateways_room_is_refused_at_once(proxy):
    assert "x-janus-room" not in (await proxy.get("/health")).headers
    answers = await burst(proxy, 10)
    assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 7
    assert len(proxy.counted) == 7
    refused = answers[-1]
    assert refused.headers["retry-after"] == "7" and refused.headers["content-type"] == "application/json"
    assert refused.json()["error"]["code"] == "overloaded" and refused.json()["error"]["type"] == "rate_limit_error"
    assert answers[0].text == "answer" and answers[0].headers["x-other"] == "kept"
    assert "x-janus-room" not in answers[0].headers


async def test_a_place_is_free_again_after_an_answer_a_failure_and_a_lost_caller(proxy):
    await proxy.get("/health")
    for _ in range(5):
        assert (await proxy.post(f"{CHAT_PATH}?fails=1")).status_code == 500
        lost = asyncio.create_task(proxy.post(CHAT_PATH))
        await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
    answers = await burst(proxy, 4)
    assert [answer.status_code for answer in answers] == [200] * 3 + [429]
    assert (await proxy.post(CHAT_PATH)).status_code == 200


async def test_nothing_is_refused_before_the_room_is_known_nor_on_other_paths(proxy):
    proxy.finish.set()
    assert [answer.status_code for answer in await asyncio.gather(*(proxy.post(CHAT_PATH) for _ in range(9)))] == [
        200
    ] * 9
    proxy.finish.clear()
    held = [asyncio.create_task(proxy.post(CHAT_PATH)) for _ in range(3)]
    await asyncio.sleep(0)
    assert (await proxy.get("/health")).status_code == 200
    assert (await proxy.get("/elsewhere")).status_code == 404
    proxy.finish.set()
    assert [(await answer).status_code for answer in held] == [200] * 3


async def test_serves_own_words_are_replaced_once_the_gateway_has_spoken(proxy):
    assert (await proxy.get("/health?serve=404")).status_code == 404
    assert (await proxy.get("/health?gateway=503")).text == "up"
    for status in (404, 500, 503):
        lost = await proxy.get(f"/health?serve={status}")
        assert lost.status_code == 503 and lost.headers["retry-after"] == "7"
        assert lost.json()["error"]["code"] == "unavailable" and "ray" not in lost.text
        assert (await proxy.get(f"/health?gateway={status}")).status_code == status


async def test_a_gateway_that_dies_with_a_request_in_its_hands_is_a_503_to_come_back_to():
    """Serve logs the death and sends nothing; the HTTP server would make that a bare 500."""
    told: list[int] = []

    async def serve(scope, receive, send):
        if scope["path"] == "/health":
            await Response("up", headers={"X-Janus-Room": "1/7"})(scope, receive, send)

    app = Admission(serve, count=lambda: told.append(1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/health")
        # One after another: the place of a request that was lost is free again.
        for _ in range(3):
            lost = await client.post(CHAT_PATH)
            assert (lost.status_code, lost.headers["retry-after"]) == (503, "7")
            assert lost.json()["error"]["code"] == "unavailable"
    assert not told
