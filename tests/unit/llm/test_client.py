from __future__ import annotations

import asyncio
import json
import time

import pytest

from janus_ray.config import validate
from janus_ray.env import api_key
from janus_ray.errors import ConfigError
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger, count_finished
from janus_ray.llm.request import LLMRequest, Sampling, derived_seed
from janus_ray.llm.retry import RetryPolicy
from tests.loopback import Reply, chat_reply, loopback

QUICK = RetryPolicy(base_s=0.01, probe_every_s=0.05)


def ask(*texts, **changes):
    messages = tuple({"role": "user", "content": text} for text in texts)
    return LLMRequest("test", messages, **changes)


async def complete(server, request, ledger=None, **endpoint):
    client = ChatClient(Endpoint(base_url=server.url, model="m", **endpoint), ledger, retry=QUICK)
    try:
        return await client.complete(request)
    finally:
        await client.close()


async def test_a_good_answer_and_what_was_sent():
    with loopback(lambda n, body: chat_reply("hello")) as server:
        request = ask("hi", sampling=Sampling(0.5, 0.9, 7, 1.03), seed=3, json_schema={"type": "object"})
        outcome = await complete(server, request)
    assert (outcome.status, outcome.text, outcome.attempts, outcome.sent) == ("ok", "hello", 1, 1)
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (3, 2)
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 7,
            "repetition_penalty": 1.03,
            "seed": 3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "test", "schema": {"type": "object"}, "strict": True},
            },
        }
    ]


@pytest.mark.parametrize(
    "fault",
    [
        Reply({"error": {"message": "boom"}}, 500),
        Reply("<html>gateway</html>", 200),
        Reply('{"choices": "no"}', 200),
        Reply("", 503),
    ],
    ids=["500", "html", "malformed", "503"],
)
async def test_passing_trouble_is_retried_and_lasting_trouble_is_a_failed_outcome(fault):
    with loopback(lambda n, body: fault if n < 2 or n > 2 else chat_reply("there")) as server:
        outcome = await complete(server, ask("hi"))
        assert (outcome.status, outcome.text, outcome.attempts) == ("ok", "there", 3)
        outcome = await complete(server, ask("hi"), max_attempts=3)
        assert (outcome.status, outcome.error_kind, outcome.attempts) == ("error", "server", 3)
        assert len(server.requests) == 6
        assert "\n" not in outcome.error_message


async def test_an_endpoint_that_hangs_is_tried_again_and_given_up():
    with loopback(lambda n, body: Reply("", delay_s=0.5)) as server:
        outcome = await complete(server, ask("hi"), timeout_s=0.05, max_attempts=2)
        # On a busy machine the time may be over before a request has arrived.
        assert (outcome.error_kind, outcome.attempts) == ("timeout", 2)
        assert outcome.error_message == "no answer within 0.05 s"


@pytest.mark.parametrize(
    ("reply", "kind", "sent"),
    [
        (Reply({"error": {"message": "bad field"}}, 400), "bad_request", 1),
        (Reply({"error": {"message": "no"}}, 401), "auth", 1),
        (chat_reply("", "stop"), "empty", 2),
        (chat_reply("part", "length"), "truncated", 2),
        (chat_reply("x", "content_filter"), "content_filter", 1),
    ],
)
async def test_what_does_not_pass_is_not_asked_again_and_again(reply, kind, sent):
    with loopback(lambda n, body: reply) as server:
        outcome = await complete(server, ask("hi", sampling=Sampling(max_tokens=10)))
    assert (outcome.error_kind, len(server.requests)) == (kind, sent)
    if kind == "truncated":
        assert [body["max_tokens"] for body in server.requests] == [10, 20]


async def test_a_request_may_keep_its_truncated_answer():
    with loopback(lambda n, body: chat_reply("part", "length")) as server:
        outcome = await complete(server, ask("hi", keep_truncated=True))
    assert (outcome.status, outcome.text, outcome.finish_reason) == ("ok", "part", "length")


@pytest.mark.parametrize("keep_truncated", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        {"content": None},
        {"content": "", "reasoning_content": "so far"},
        {"content": "<think>so far"},
        {"content": "<think>all of it</think> "},
    ],
)
async def test_an_answer_that_thoughts_took_the_room_of_is_asked_for_with_more(cut, keep_truncated):
    def answer(n, body):
        enough = body["max_tokens"] >= 100
        choice = {"finish_reason": "stop", "message": {"content": "<think>long</think>done"}}
        return chat_reply("", choices=[choice if enough else {"finish_reason": "length", "message": cut}])

    request = ask("hi", sampling=Sampling(max_tokens=10), keep_truncated=keep_truncated)
    with loopback(answer) as server:
        outcome = await complete(server, request)
        assert (outcome.status, outcome.text, outcome.sent) == ("ok", "done", 3)
        assert [body["max_tokens"] for body in server.requests] == [10, 40, 160]
        never = await complete(server, ask("hi", sampling=Sampling(max_tokens=1), keep_truncated=keep_truncated))
    assert (never.status, never.error_kind, never.text, never.sent) == ("error", "truncated", "", 3)
    assert never.error_message.endswith("; asked with 16 tokens of room")
    assert never.usage.completion_tokens == 6


async def test_more_room_than_the_endpoint_has_leaves_the_reason_of_the_cut():
    def answer(n, body):
        too_much = Reply({"error": {"message": "max_tokens is too large"}}, 400)
        return chat_reply("", "length") if body["max_tokens"] == 10 else too_much

    with loopback(answer) as server:
        outcome = await complete(server, ask("hi", sampling=Sampling(max_tokens=10), keep_truncated=True))
    assert outcome.error_kind == "truncated"
    assert outcome.error_message == (
        "the answer was cut at max_tokens, before any text; asked with 40 tokens of room: "
        "HTTP 400: max_tokens is too large"
    )


async def test_where_no_limit_was_asked_for_the_room_that_was_used_is_the_measure():
    cut = chat_reply("part", "length", usage={"prompt_tokens": 1, "completion_tokens": 50})
    with loopback(lambda n, body: chat_reply("whole") if body.get("max_tokens") == 100 else cut) as server:
        assert (await complete(server, ask("hi"))).text == "whole"
        # An endpoint that takes no limit cannot be given more room.
        assert (await complete(server, ask("hi"), omit=["max_tokens"])).error_kind == "truncated"
    assert [body.get("max_tokens") for body in server.requests] == [None, 100, None]


async def test_parameters_are_left_out_and_named_as_the_endpoint_wants_them():
    request = ask("hi", sampling=Sampling(0.5, 0.9, 7, 1.03), seed=3)
    every = ["temperature", "top_p", "max_tokens", "seed", "repetition_penalty"]
    with loopback(lambda n, body: chat_reply("hello")) as server:
        await complete(server, request, omit=every)
        await complete(server, request, max_tokens_field="max_completion_tokens", omit=["seed"])
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    rest = {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 7, "repetition_penalty": 1.03}
    assert server.requests == [base, base | rest]


async def test_half_a_surrogate_pair_is_replaced_wherever_it_stands_and_the_row_goes_on(tmp_path):
    """In the request's message, in an answer and in an error text; the ledger holds the outcome."""
    bodies = [
        '{"choices": [{"finish_reason": "stop", "message": {"content": "ok \\ud83d"}}]}',
        '{"choices": [{"finish_reason": "stop", "message": {"content": null, "refusal": "no \\ud83d"}}]}',
        '{"error": {"message": "bad \\ud83d", "code": "\\ud83d"}}',
    ]
    with loopback(lambda n, body: Reply(bodies[n], 200 if n < 2 else 400)) as server:
        outcomes = [await complete(server, ask(f"half \ud83d {n}"), Ledger(tmp_path)) for n in range(3)]
        again = await complete(server, ask("half \ud83d 0"), Ledger(tmp_path))
    assert [body["messages"][0]["content"] for body in server.requests] == [f"half \ufffd {n}" for n in range(3)]
    assert outcomes[0].text == "ok \ufffd"
    assert [outcome.error_message for outcome in outcomes[1:]] == ["no \ufffd", "HTTP 400: bad \ufffd"]
    assert (again.text, again.sent) == ("ok \ufffd", 0)


async def test_a_filtered_prompt_is_not_asked_again_by_a_later_run(tmp_path):
    body = {"error": {"message": "filtered", "code": "content_filter", "status": 400}}
    with loopback(lambda n, _: Reply(body, 400)) as server:
        for sent in (1, 0):
            outcome = await complete(server, ask("hi"), Ledger(tmp_path))
            assert (outcome.error_kind, outcome.error_message, outcome.sent) == (
                "content_filter",
                "HTTP 400: filtered",
                sent,
            )


async def test_words_of_a_provider_cannot_steer_the_terminal():
    with loopback(lambda n, _: Reply({"error": {"message": "a\x1b[2Jb\x00\r\nc\u202e"}}, 400)) as server:
        outcome = await complete(server, ask("hi"))
    assert outcome.error_message == "HTTP 400: a [2Jb c"


async def test_a_429_waits_as_told_costs_no_attempt_and_holds_the_others_back():
    arrivals = []

    def answer(n, body):
        arrivals.append(time.monotonic())
        return Reply("", 429, {"retry-after": "0.3"}) if n < 2 else chat_reply("ok")

    with loopback(answer) as server:
        client = ChatClient(Endpoint(base_url=server.url, model="m", max_attempts=1))
        outcomes = await asyncio.gather(*(client.complete(ask(str(i))) for i in range(2)))
        later = await client.complete(ask("later"))
        await client.close()
    assert [outcome.status for outcome in [*outcomes, later]] == ["ok"] * 3
    assert [outcome.attempts for outcome in outcomes] == [1, 1]
    assert sum(outcome.sent for outcome in outcomes) == 4
    assert arrivals[2] - arrivals[0] >= 0.3


async def test_endless_429s_end_as_a_failed_outcome():
    with loopback(lambda n, body: Reply("", 429, {"retry-after": "0.2"})) as server:
        outcome = await complete(server, ask("hi"), max_wait_s=0.5)
    assert outcome.error_kind == "rate_limit"
    assert len(server.requests) <= 4


async def test_a_dead_endpoint_fails_the_rest_at_once():
    endpoint = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", max_attempts=1, give_up_after_s=0.05)
    client = ChatClient(endpoint)
    first = await client.complete(ask("a"))
    await asyncio.sleep(0.1)
    # One failure and idle time do not make an endpoint count as down.
    more = [await client.complete(ask(str(n))) for n in range(8)]
    rest = [await client.complete(ask(f"rest {n}")) for n in range(3)]
    await client.close()
    assert {outcome.error_kind for outcome in (first, *more[:7])} == {"connection"}
    # One request in every few seconds finds out whether it is back.
    assert [outcome.error_kind for outcome in (more[7], *rest)] == ["connection", *["endpoint_down"] * 3]
    assert [outcome.sent for outcome in rest] == [0, 0, 0]


async def test_an_endpoint_that_comes_back_is_asked_again():
    with loopback(lambda n, body: Reply("", 500) if n < 10 else chat_reply("back")) as server:
        endpoint = Endpoint(base_url=server.url, model="m", max_attempts=1, give_up_after_s=0.01)
        client = ChatClient(endpoint, retry=QUICK)
        outcomes = []
        while not outcomes or outcomes[-1].status == "error":
            outcomes.append(await client.complete(ask(str(len(outcomes)))))
            await asyncio.sleep(0.01)
        await client.close()
    assert "endpoint_down" in {outcome.error_kind for outcome in outcomes}
    assert outcomes[-1].text == "back"


async def test_an_empty_account_is_not_waited_for():
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with loopback(lambda n, _: Reply(body, 429)) as server:
        outcome = await complete(server, ask("a"))
    assert (outcome.error_kind, outcome.sent) == ("quota", 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"usage": {"prompt_tokens": 3}}, "fine"),
        ({"usage": {"prompt_tokens": None, "completion_tokens": None}}, "fine"),
        ({"usage": None}, "fine"),
        ({"choices": [{"message": {"content": [{"type": "text", "text": "parts"}]}}]}, "parts"),
    ],
)
async def test_odd_but_good_answers_are_taken(changes, text):
    with loopback(lambda n, body: chat_reply("fine", **changes)) as server:
        outcome = await complete(server, ask("a"))
    assert (outcome.status, outcome.text, outcome.sent) == ("ok", text, 1)


def test_secrets_stay_out_of_recipes_and_messages(monkeypatch):
    for field, value in (("base_url", "https://me:hunter2@host/v1"), ("api_key_env", "sk-hunter2")):
        values = {"base_url": "http://h/v1", "model": "m", field: value}
        with pytest.raises(ConfigError) as refused:
            validate(Endpoint, values, "recipe")
        assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("SOME_KEY", " sk-fine\r\n")
    assert api_key("SOME_KEY") == "sk-fine"
    monkeypatch.setenv("SOME_KEY", "sk-hünter2")
    with pytest.raises(ConfigError, match="SOME_KEY holds characters") as refused:
        api_key("SOME_KEY")
    assert "hünter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:port/v1", "http:///v1", "http://h/v1?key=1"])
def test_an_address_that_cannot_be_one_is_refused(url):
    with pytest.raises(ConfigError, match="is not a URL"):
        validate(Endpoint, {"base_url": url, "model": "m"}, "recipe")


async def test_never_more_in_flight_than_allowed_and_no_less_when_there_is_work():
    with loopback(lambda n, body: Reply(chat_reply("x").body, delay_s=0.05)) as server:
        client = ChatClient(Endpoint(base_url=server.url, model="m", max_concurrency=5))
        await asyncio.gather(*(client.complete(ask(str(i))) for i in range(30)))
        await client.close()
    assert server.peak_in_flight == 5


async def test_the_ledger_answers_what_was_finished_and_retries_what_failed(tmp_path):
    def answer(n, body):
        return Reply("", 400) if body["messages"][0]["content"] == "bad" and n < 2 else chat_reply("ok")

    with loopback(answer) as server:
        for _ in range(2):
            ledger = Ledger(tmp_path)
            good = await complete(server, ask("good"), ledger)
            bad = await complete(server, ask("bad"), ledger)
    assert (good.status, good.sent, bad.status) == ("ok", 0, "ok")
    assert [body["messages"][0]["content"] for body in server.requests] == ["good", "bad", "bad"]
    assert count_finished(tmp_path) == 2


async def test_a_torn_line_and_garbage_in_the_ledger_are_skipped(tmp_path):
    with loopback(lambda n, body: chat_reply("ok")) as server:
        await complete(server, ask("one"), Ledger(tmp_path))
        file = next(tmp_path.glob("*.jsonl"))
        whole = file.read_text()
        file.write_text(whole + "\x00\xff garbage\n[]\n" + whole[: len(whole) // 2])
        assert (await complete(server, ask("one"), Ledger(tmp_path))).sent == 0
        file.write_text(whole[: len(whole) // 2])
        assert (await complete(server, ask("one"), Ledger(tmp_path))).sent == 1


def test_the_content_key_changes_with_everything_that_changes_the_answer():
    base = ask("hi")
    variants = [
        ask("ho"),
        ask("hi", sampling=Sampling(temperature=0.1)),
        ask("hi", seed=1),
        ask("hi", sample_index=1),
        ask("hi", prompt_sha256="p"),
        ask("hi", json_schema={"type": "object"}),
        ask("hi", keep_truncated=True),
        LLMRequest("other", base.messages),
    ]
    keys = {request.key("m", "u") for request in [base, *variants]}
    keys |= {base.key("m2", "u"), base.key("m", "u2")}
    assert ask("hi", sampling=Sampling(0.5)).without(["temperature"]).key("m", "u") == base.key("m", "u")
    assert ask("hi", seed=3).without(["seed"]).key("m", "u") == base.key("m", "u")
    assert len(keys) == len(variants) + 3
    assert base.key("m", "u") == ask("hi").key("m", "u")
    json.dumps(sorted(keys))


def test_seeds_depend_on_their_parts_only():
    assert derived_seed(0, "a", 1) == derived_seed(0, "a", 1)
    assert (
        len({derived_seed(0, "a", 1), derived_seed(1, "a", 1), derived_seed(0, "b", 1), derived_seed(0, "a", 2)}) == 4
    )
    assert 0 <= derived_seed(0, "a") < 2**31
