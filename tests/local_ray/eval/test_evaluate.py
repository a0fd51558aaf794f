"""Evaluation on a real Ray cluster, against loopback endpoints whose every answer the test decides."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from janus_ray.errors import ConfigError
from janus_ray.eval import run as module
from janus_ray.eval.run import evaluate
from janus_ray.store.files import read_json
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_jsonl
from tests.evaluation import PEOPLE, PROMPTS, RUBRICS, obedient, recipe_for, strict
from tests.loopback import Reply, chat_reply, loopback


@pytest.fixture(autouse=True)
def in_the_shared_cluster(monkeypatch):
    monkeypatch.setattr(module, "ray_cluster", lambda *arguments, **keywords: nullcontext())


def test_an_obedient_policy_gets_the_numbers_it_must_get(tmp_path):
    with loopback(obedient) as policy, loopback(strict) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, "fail").as_json()
        sent = len(policy.requests), len(judge.requests)
        assert sent == (PROMPTS * (PEOPLE + 1), PROMPTS * (PEOPLE + 1) * PEOPLE * RUBRICS)
        again = evaluate(recipe, "resume").as_json()
        assert (len(policy.requests), len(judge.requests)) == sent
        # Also when the manifest is lost: the ledger knows every answer.
        (tmp_path / "out" / "manifest.json").unlink()
        evaluate(recipe, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
        with pytest.raises(ConfigError, match="is finished: --if-exists resume continues it"):
            evaluate(recipe, "fail")
    main = results["models"]["m"]
    assert {name: main[name]["overall"]["mean"] for name in ("own_system", "no_system", "sibling_system")} == {
        "own_system": 5.0,
        "no_system": 2.0,
        "sibling_system": 2.0,
    }
    gain = results["steering_gain"]["overall"]
    assert {name: gain[name] for name in ("mean", "low", "high", "n", "coverage")} == {
        "mean": 3.0,
        "low": 3.0,
        "high": 3.0,
        "n": 4,
        "coverage": 1.0,
    }
    assert results["matrix"]["m"] == [[5, 2, 2], [2, 5, 2], [2, 2, 5]]
    assert again == read_json(tmp_path / "out" / "results.json") == results
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000


def test_what_failed_is_counted_withheld_and_tried_again(tmp_path):
    trouble = {"on": True}

    def policy_answer(n, body):
        if trouble["on"] and body["messages"][-1]["content"] == "Question 0?":
            return Reply({"error": {"message": "broken"}}, 500)
        return obedient(n, body)

    with loopback(policy_answer) as policy, loopback(strict) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, "fail").as_json()
        assert results["models"]["m"]["own_system"]["overall"]["coverage"] == 0.75
        assert results["models"]["m"]["own_system"]["overall"]["mean"] is None
        assert results["steering_gain"]["overall"]["mean"] is None
        assert results["models"]["m"]["own_system"]["per_split"]["seen"]["overall"]["mean"] == 5.0
        due = (PEOPLE + 1) * PEOPLE * RUBRICS
        assert results["status_counts"]["judgments"] == {"m": {"no_response": due, "ok": 3 * due}}
        generations = read_jsonl(tmp_path / "out" / "generations.jsonl")
        assert {row["status"] for row in generations if row["prompt"] == "Question 0?"} == {"api_fail"}
        trouble["on"] = False
        before = len(policy.requests), len(judge.requests)
        results = evaluate(recipe, "resume").as_json()
        assert (len(policy.requests), len(judge.requests)) == (before[0] + PEOPLE + 1, before[1] + due)
    own = results["models"]["m"]["own_system"]["overall"]
    assert (own["mean"], own["coverage"]) == (5.0, 1.0)
    assert read_manifest(tmp_path / "out")["status_counts"]["judgments"] == {"m": {"ok": 4 * due}}


def test_a_judge_without_a_verdict_is_asked_for_it_once(tmp_path):
    def judge_answer(n, body):
        messages = body["messages"]
        if "Question 1?" in messages[0]["content"]:
            return chat_reply("I cannot decide.")
        if "Question 2?" in messages[0]["content"]:
            return chat_reply("[RESULT] 4") if len(messages) == 3 else chat_reply("Hmm, rather good.", "length")
        return strict(n, body)

    with loopback(obedient) as policy, loopback(judge_answer) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, "fail").as_json()
        due = (PEOPLE + 1) * PEOPLE * RUBRICS
        assert len(judge.requests) == PROMPTS * due + 2 * due
        asked_again = [body["messages"] for body in judge.requests if len(body["messages"]) > 1]
        assert {messages[1]["content"] for messages in asked_again} == {"I cannot decide.", "Hmm, rather good."}
        evaluate(recipe, "resume")
        assert len(judge.requests) == PROMPTS * due + 2 * due
    assert results["status_counts"]["judgments"] == {"m": {"ok": 3 * due, "parse_fail": due}}
    per_split = results["models"]["m"]["own_system"]["per_split"]
    assert per_split["unseen"]["overall"]["mean"] == 4.5
    assert per_split["seen"]["overall"]["coverage"] == 0.5


def test_without_siblings_each_response_is_judged_for_its_person_alone(tmp_path):
    with loopback(obedient) as policy, loopback(strict) as judge:
        models = [{"name": "m", "model": "m", "conditions": ["own_system"]}]
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False, models=models)
        results = evaluate(recipe, "fail").as_json()
        assert len(judge.requests) == PROMPTS * PEOPLE * RUBRICS
    assert results["models"]["m"]["own_system"]["overall"]["mean"] == 5.0
    assert "sibling_system" not in results["models"]["m"]


def test_empty_and_truncated_responses_are_judged_as_they_are_and_unfinished_ones_are_not(tmp_path):
    def policy_answer(n, body):
        role = body["messages"][0]["role"]
        question = body["messages"][-1]["content"]
        if role == "system":
            return chat_reply("This is for person 0", "length")
        # Thoughts took all the room, also when there is more of it.
        return chat_reply(None, "length") if question == "Question 0?" else chat_reply("")

    with loopback(policy_answer) as policy, loopback(strict) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, "fail").as_json()
        rooms = {body["max_tokens"] for body in policy.requests if len(body["messages"]) == 1}
    assert len(rooms) > 1 and min(rooms) == 1024
    statuses = results["status_counts"]["generations"]["m"]
    assert statuses == {"truncated": PROMPTS * PEOPLE, "empty": PROMPTS - 1, "unfinished": 1}
    none = results["models"]["m"]["no_system"]["overall"]
    assert (none["mean"], none["coverage"]) == (None, (PROMPTS - 1) / PROMPTS)
    assert results["models"]["m"]["own_system"]["overall"]["coverage"] == 1.0
    unfinished = [row for row in read_jsonl(tmp_path / "out" / "generations.jsonl") if row["status"] == "unfinished"]
    assert "cut at max_tokens" in unfinished[0]["error_message"]
