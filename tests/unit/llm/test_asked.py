"""What is counted of requests, from the client that asks to what the driver reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from janus_ray.llm import asked
from janus_ray.llm.asked import add_outcome, report
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import Completion, LLMRequest, Usage
from tests.loopback import chat_reply, loopback


def reported(monkeypatch, *counts) -> dict[tuple[str, ...], int]:
    """What the metrics are told."""
    told = Counter()

    def count(metric, value=1, **labels):
        assert tuple(labels) == metric.labels
        told[metric.name, *labels.values()] += value

    monkeypatch.setattr(asked, "count", count)
    for some in counts:
        report(some)
    return {name: value for name, value in told.items() if value}


def test_what_was_sent_is_counted_and_what_the_ledger_knew_is_not_paid_for_again(monkeypatch):
    counts = Counter()
    thrice = Completion("ok", "No.", usage=Usage(7, 2), sent=3)
    for outcome in (
        Completion("ok", "Yes.", usage=Usage(7, 2), sent=1),
        thrice,
        thrice.from_ledger(),
        replace(Completion.failure("timeout", "late", 2), sent=2),
    ):
        add_outcome(counts, "judge", outcome)
    assert reported(monkeypatch, counts) == {
        ("janus_asked", "judge", "ok"): 3,
        ("janus_asked", "judge", "timeout"): 1,
        ("janus_asked_sent", "judge"): 6,
        ("janus_asked_retries", "judge"): 3,
        ("janus_asked_ledger_hits", "judge"): 1,
        ("janus_asked_tokens", "judge", "prompt"): 14,
        ("janus_asked_tokens", "judge", "completion"): 4,
    }


async def test_a_client_counts_each_request_once_by_its_kind(tmp_path, monkeypatch):
    request = LLMRequest("response", ({"role": "user", "content": "Hello?"},))
    with loopback(lambda number, body: chat_reply("Yes.")) as endpoint:
        client = ChatClient(Endpoint(base_url=endpoint.url, model="m"), Ledger(tmp_path))
        await client.complete(request)
        first = client.take_counts()
        await client.complete(request)
        again = client.take_counts()
        assert not client.take_counts()
        await client.close()
    assert reported(monkeypatch, first)["janus_asked_tokens", "response", "prompt"] == 3
    assert reported(monkeypatch, again) == {
        ("janus_asked", "response", "ok"): 1,
        ("janus_asked_ledger_hits", "response"): 1,
    }
