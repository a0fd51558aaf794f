"""Asking with real client actors: the whole limit, a stream without an end, an actor that dies, and what ends a job."""

from __future__ import annotations

import itertools
from contextlib import suppress

import psutil
import pytest
import ray

from janus_ray.errors import ConfigError, DataError
from janus_ray.llm import fanout
from janus_ray.llm.endpoint import ReachedEndpoint
from janus_ray.llm.fanout import ask_all
from janus_ray.llm.ledger import count_finished
from janus_ray.llm.request import LLMRequest
from tests.loopback import chat_reply, loopback


def ask(number, text=None):
    return LLMRequest("judge", ({"role": "user", "content": text or f"number {number}"},), custom_id=str(number))


def echo(n, body):
    return chat_reply(body["messages"][0]["content"])


def numbered(n, body):
    return chat_reply(f"answer {n}")


def client_processes():
    """Those of this session's cluster; Ray names a process after its actor."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [each] if "EndpointClient" in " ".join(each.cmdline()) else []
    return found


def test_few_requests_over_several_actors_use_the_whole_limit_and_not_more(tmp_path):
    with loopback(echo, held_until_in_flight=7) as server:
        target = ReachedEndpoint(base_url=server.url, model="m", max_concurrency=7)
        answers = ask_all([ask(n) for n in range(9)], target, tmp_path, 3, "ask")
        assert {request.custom_id: outcome.text for request, outcome in answers} == {
            str(n): f"number {n}" for n in range(9)
        }
    assert (server.peak_in_flight, server.gave_up_holding) == (7, False)


def test_a_stream_without_an_end_is_read_a_few_ahead_and_its_answers_are_on_disk(tmp_path):
    before = {each.pid for each in client_processes()}
    taken = itertools.count()
    with loopback(echo) as server:
        target = ReachedEndpoint(base_url=server.url, model="m", max_concurrency=4)
        answers = ask_all((ask(number) for number in taken), target, tmp_path, 2, "ask")
        for seen in range(1, 11):
            request, outcome = next(answers)
            assert outcome.text == f"number {request.custom_id}"
            assert count_finished(tmp_path) >= seen
        answers.close()
    assert next(taken) <= 10 + 4 * 4 + 8
    # The kill is on its way to the process.
    gone, alive = psutil.wait_procs([each for each in client_processes() if each.pid not in before], timeout=60)
    assert not alive, gone


def test_equal_requests_get_answers_of_their_own_and_keep_them_when_an_actor_dies_and_on_a_resume(tmp_path, capsys):
    requests = [ask(number, text=f"text {number % 3}") for number in range(24)]
    with loopback(numbered) as server:
        target = ReachedEndpoint(base_url=server.url, model="m", max_concurrency=4)
        answered = {}
        for request, outcome in ask_all(iter(requests), target, tmp_path, 2, "ask", total=24):
            if not answered:
                client_processes()[0].kill()
            answered[request.custom_id] = outcome.text
        sent = len(server.requests)
        again = {request.custom_id: outcome.text for request, outcome in ask_all(requests, target, tmp_path, 1, "ask")}
        assert len(server.requests) == sent <= 24 + 4
    assert again == answered
    assert len(answered) == len(set(answered.values())) == 24
    assert "ask: 24 done, 0 requests sent" in capsys.readouterr().out


def test_what_ends_the_job_is_one_line_of_ours(tmp_path):
    with loopback(echo) as server:
        target = ReachedEndpoint(base_url=server.url, model="m", max_concurrency=4)
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="an answer cannot be recorded") as error:
            list(ask_all([ask(1)], target, tmp_path / "file" / "ledger", 1, "ask"))
        assert "\n" not in str(error.value)
        locked = target.model_copy(update={"api_key_env": "NO_SUCH_KEY_ANYWHERE"})
        with pytest.raises(ConfigError, match="NO_SUCH_KEY_ANYWHERE") as error:
            list(ask_all([ask(1)], locked, tmp_path, 1, "ask"))
        assert "\n" not in str(error.value)


def test_a_process_that_finds_no_cpu_is_named_and_the_others_do_its_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fanout, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(fanout, "_PING_S", 5.0)
    occupied = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])
    try:
        assert occupied.wait(60)
        with loopback(echo) as server:
            target = ReachedEndpoint(base_url=server.url, model="m", max_concurrency=4)
            answers = ask_all([ask(n) for n in range(40)], target, tmp_path, 2, "ask")
            assert {request.custom_id for request, _ in answers} == {str(n) for n in range(40)}
            assert len(server.requests) == 40
    finally:
        ray.util.remove_placement_group(occupied)
    assert "1 of 2 client processes do not answer" in capsys.readouterr().out
