"""Waiting, on a clock that tests turn."""

from __future__ import annotations

import asyncio
from email.utils import formatdate

import pytest

from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.request import LLMRequest
from janus_ray.llm.retry import Pacer, RetryPolicy
from tests.loopback import Reply, chat_reply, loopback

TODAY = 1_780_000_000.0


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now_s = 1000.0
        self.slept = []

    async def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)

    def policy(self, **changes):
        def uniform(low, high):
            return high

        return RetryPolicy(clock=lambda: self.now_s, now=lambda: TODAY, sleep=self.sleep, uniform=uniform, **changes)


@pytest.mark.parametrize(
    ("headers", "told_s"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "99999999"}, 600.0),
        ({"retry-after": "9" * 5000}, 600.0),
        ({"retry-after": formatdate(TODAY + 40, usegmt=True)}, 40.0),
        ({"retry-after": formatdate(TODAY - 40, usegmt=True)}, None),
        ({"retry-after": formatdate(TODAY + 9e6, usegmt=True)}, 600.0),
        # The server's clock is its own.
        ({"retry-after": formatdate(5e8 + 40, usegmt=True), "date": formatdate(5e8, usegmt=True)}, 40.0),
        ({"retry-after": "0"}, None),
        ({"retry-after": "0.0"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1_0"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 99 Foo 2026"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "0", "retry-after": "2"}, 2.0),
    ],
)
def test_what_a_server_asks_to_wait(headers, told_s):
    assert Clock().policy().told_s(headers) == told_s


def refused_rounds(told_s, rounds, in_flight=8):
    """The pauses after rounds in which every request is refused."""
    clock = Clock()
    pacer = Pacer(clock.policy())
    pauses = []
    for _ in range(rounds):
        sent_at = clock.now_s
        clock.now_s += 0.01
        pauses.append([pacer.refused(sent_at, told_s) for _ in range(in_flight)][-1])
        asyncio.run(pacer.wait())
    return pauses


def test_pauses_grow_while_every_request_is_refused_and_one_round_counts_once():
    assert refused_rounds(None, 5) == pytest.approx([0.75, 1.5, 3.0, 6.0, 12.0])
    assert refused_rounds(0.2, 3) == pytest.approx([0.2, 1.5, 3.0])
    assert refused_rounds(20.0, 3) == pytest.approx([20.0, 20.0, 20.0])
    # Bounded, however long it goes on.
    assert max(refused_rounds(None, 2000, 1)) == pytest.approx(45.0)


def test_successes_shorten_the_next_pause():
    clock = Clock()
    pacer = Pacer(clock.policy())
    for _ in range(4):
        clock.now_s += 1
        pacer.refused(clock.now_s, None)
    for _ in range(3):
        clock.now_s += 1
        pacer.accepted(clock.now_s)
    clock.now_s += 100
    assert pacer.refused(clock.now_s, None) == pytest.approx(1.5)


@pytest.mark.parametrize("told", ["0", "-1", formatdate(TODAY - 60, usegmt=True), "nonsense"])
async def test_a_server_that_says_now_and_refuses_is_not_hammered(told):
    """8 in flight for 20 s: at most one refused request each in a round, and few rounds."""
    clock = Clock()
    with loopback(lambda n, body: Reply("", 429, {"retry-after": told})) as server:
        endpoint = Endpoint(base_url=server.url, model="m", max_concurrency=8, max_wait_s=20)
        client = ChatClient(endpoint, retry=clock.policy())
        requests = [LLMRequest("test", ({"role": "user", "content": str(n)},)) for n in range(8)]
        outcomes = await asyncio.gather(*(client.complete(request) for request in requests))
        await client.close()
    assert {outcome.error_kind for outcome in outcomes} == {"rate_limit"}
    assert {outcome.attempts for outcome in outcomes} == {0}
    # 0.75 + 1.5 + 3 + 6 s are waited for, 12 more would be too long.
    assert 8 <= len(server.requests) <= 8 * 5
    assert clock.now_s - 1000 <= 20


async def test_a_busy_server_is_waited_for_as_long_as_it_says():
    clock = Clock()
    replies = [Reply("", 503, {"retry-after": "7"}), Reply("", 503, {"retry-after": "0"}), chat_reply("there")]
    with loopback(lambda n, body: replies[n]) as server:
        client = ChatClient(Endpoint(base_url=server.url, model="m"), retry=clock.policy())
        outcome = await client.complete(LLMRequest("test", ({"role": "user", "content": "hi"},)))
        await client.close()
    assert (outcome.text, outcome.attempts) == ("there", 3)
    assert clock.slept == [7.0, 1.0]
