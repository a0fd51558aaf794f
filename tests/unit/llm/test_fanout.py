"""What a fan-out does without Ray: how a limit is divided, and how equal requests are told apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.llm import fanout
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.fanout import EndpointClient, _supply, ask_all, shares, told_apart
from janus_ray.llm.ledger import count_finished
from janus_ray.llm.request import Completion, LLMRequest, Usage
from tests.loopback import chat_reply, loopback


def ask(text, **changes):
    return LLMRequest("judge", ({"role": "user", "content": text},), **changes)


@given(limit=st.integers(1, 1000), actors=st.integers(1, 64))
def test_the_whole_limit_is_divided_and_not_one_more(limit, actors):
    parts = shares(limit, actors)
    assert sum(parts) == limit
    assert len(parts) == min(limit, actors)
    assert max(parts) - min(parts) <= 1 <= min(parts)


def test_equal_requests_are_numbered_in_their_order_and_come_back_as_they_were():
    given_ones = [ask("a", custom_id="1"), ask("b"), ask("a", custom_id="2"), ask("a", sample_index=5), ask("a")]
    pairs = list(told_apart(iter(given_ones)))
    assert [request for request, _ in pairs] == given_ones
    assert [numbered.sample_index for _, numbered in pairs] == [0, 0, 1, 5, 2]
    assert len({numbered.key("m", "e") for _, numbered in pairs}) == 5
    # Whose request it is changes no answer.
    assert given_ones[0].key("m", "e") == replace(given_ones[0], custom_id="").key("m", "e")


@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=5), count=st.integers(0, 200), busy=st.integers(0, 3))
def test_requests_are_taken_a_bounded_number_ahead_and_spread_over_all_actors(parts, count, busy):
    load = [min(busy, 4 * part) for part in parts]
    before = list(load)
    waiting = iter(range(count))
    calls = list(_supply(waiting, load, parts))
    left = len(list(waiting))
    taken = [sum(len(items) for actor, items in calls if actor == index) for index in range(len(parts))]
    assert [now - then for now, then in zip(load, before, strict=True)] == taken
    assert sum(taken) + left == count
    assert all(now <= 4 * part for now, part in zip(load, parts, strict=True))
    # Nobody waits while there is work, and nobody has a second share before all have their first.
    assert left == 0 or all(now == 4 * part for now, part in zip(load, parts, strict=True))
    assert count < sum(parts) or all(now >= part for now, part in zip(load, parts, strict=True))


def test_what_was_sent_is_counted_and_what_the_ledger_knew_is_not_paid_for_again(monkeypatch):
    counted = Counter()

    def count(metric, value=1, **labels):
        assert tuple(labels) == metric.labels
        counted[metric.name, *labels.values()] += value

    monkeypatch.setattr(fanout, "count", count)
    fanout._count("evaluate", Completion("ok", "Yes.", usage=Usage(7, 2), sent=1))
    fanout._count("evaluate", Completion("ok", "No.", usage=Usage(7, 2), sent=3))
    fanout._count("evaluate", Completion("ok", "No.", usage=Usage(7, 2), sent=3).from_ledger())
    fanout._count("evaluate", replace(Completion.failure("timeout", "late", 2), sent=2))
    assert {name: value for name, value in counted.items() if value} == {
        ("janus_asked", "evaluate", "ok"): 3,
        ("janus_asked", "evaluate", "timeout"): 1,
        ("janus_asked_sent", "evaluate"): 6,
        ("janus_asked_retries", "evaluate"): 3,
        ("janus_asked_ledger_hits", "evaluate"): 1,
        ("janus_asked_tokens", "evaluate", "prompt"): 14,
        ("janus_asked_tokens", "evaluate", "completion"): 4,
    }


def test_nothing_to_ask_starts_no_process(tmp_path):
    """There is no cluster here."""
    target = ReachedEndpoint(base_url="http://127.0.0.1:9/v1", model="m")
    assert list(ask_all(iter(()), target, tmp_path / "ledger", 4, "ask")) == []


async def test_a_process_that_ends_leaves_nothing_behind_in_memory_and_says_so_where_it_must(s3):
    """An object storage gets answers half a second late; what it has not when a process ends would be lost."""
    folder = f"{s3.folder()}/ledger"
    with loopback(lambda n, body: chat_reply("yes")) as server:
        target = ReachedEndpoint(base_url=server.url, model="m").model_dump(mode="json")
        process = EndpointClient(target, folder, 4)
        assert [outcome.text for outcome in (await process.answer([ask("a"), ask("b")])).results] == ["yes", "yes"]
        assert (await process.close()).fatal is None
        assert count_finished(folder) == 2
        process = EndpointClient(target, folder, 4)
        assert [outcome.sent for outcome in (await process.answer([ask("b"), ask("c")])).results] == [0, 1]
        s3.fail("refuse", "PUT")
        fatal = (await process.close()).fatal
        assert isinstance(fatal, DataError) and "\n" not in str(fatal)
