"""What a fan-out does without Ray: how a limit is divided, and how equal requests are told apart."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from janus_ray.llm.fanout import _supply, shares, told_apart
from janus_ray.llm.request import LLMRequest


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
