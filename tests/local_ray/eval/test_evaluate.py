"""Evaluation on a real Ray cluster, against loopback endpoints whose every answer the test decides."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from janus_ray.errors import ConfigError, DataError
from janus_ray.eval import report as report_module
from janus_ray.eval import run as module
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.eval.run import evaluate
from janus_ray.store.files import read_json, write_jsonl
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_jsonl
from tests.loopback import Reply, chat_reply, loopback
from tests.unit.eval.test_bench import row

PEOPLE, PROMPTS = 3, 4


@pytest.fixture(autouse=True)
def in_the_shared_cluster(monkeypatch):
    monkeypatch.setattr(module, "ray_cluster", lambda *arguments, **keywords: nullcontext())


def recipe_for(folder: Path, policy: str, judge: str, **changes) -> EvaluateRecipe:
    rubric = row()["rubrics"][0]
    rows = [
        row(
            prompt=f"Question {prompt}?",
            system=f"You serve person {person}.",
            rubrics=[{**rubric, "criteria": f"Is it for person {person}?"}] * 4,
            split="seen" if prompt % 2 else "unseen",
        )
        for prompt in range(PROMPTS)
        for person in range(PEOPLE)
    ]
    write_jsonl(folder / "bench.jsonl", rows)
    return EvaluateRecipe.model_validate(
        {
            "bench": str(folder / "bench.jsonl"),
            "output_dir": str(folder / "out"),
            "main_model": "m",
            "client_actors": 1,
            "models": [{"name": "m", "model": "m"}],
            "policy": {"base_url": policy, "max_concurrency": 8, "max_attempts": 2},
            "judge": {"base_url": judge, "model": "m", "max_concurrency": 8, "max_attempts": 2},
            **changes,
        }
    )


def obedient(n, body):
    """A policy that does as its system message says."""
    first = body["messages"][0]
    person = first["content"].removeprefix("You serve ") if first["role"] == "system" else "nobody."
    return chat_reply(f"This is for {person}")


def strict(n, body):
    """A judge that gives 5 to what names the rubric's person and 2 to everything else."""
    text = body["messages"][0]["content"]
    response = re.search(r"### Response\n(.*)\n", text)[1]
    criterion = re.search(r"Is it for (person \d)\?", text)[1]
    return chat_reply(f"Feedback: so. [RESULT] {5 if criterion in response else 2}")


def test_an_obedient_policy_gets_the_numbers_it_must_get(tmp_path):
    with loopback(obedient) as policy, loopback(strict) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, recipe.judge, "fail")
        sent = len(policy.requests), len(judge.requests)
        assert sent == (PROMPTS * (PEOPLE + 1), PROMPTS * (PEOPLE + 1) * PEOPLE * 4)
        again = evaluate(recipe, recipe.judge, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
        # Also when the manifest is lost: the ledger knows every answer.
        (tmp_path / "out" / "manifest.json").unlink()
        evaluate(recipe, recipe.judge, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
        with pytest.raises(ConfigError, match="is finished: --if-exists resume continues it"):
            evaluate(recipe, recipe.judge, "fail")
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
        results = evaluate(recipe, recipe.judge, "fail")
        assert results["models"]["m"]["own_system"]["overall"]["coverage"] == 0.75
        assert results["models"]["m"]["own_system"]["overall"]["mean"] is None
        assert results["steering_gain"]["overall"]["mean"] is None
        assert results["models"]["m"]["own_system"]["per_split"]["seen"]["overall"]["mean"] == 5.0
        due = (PEOPLE + 1) * PEOPLE * 4
        assert results["status_counts"]["judgments"] == {"m": {"no_response": due, "ok": 3 * due}}
        generations = read_jsonl(tmp_path / "out" / "generations.jsonl")
        assert {row["status"] for row in generations if row["prompt"] == "Question 0?"} == {"api_fail"}
        trouble["on"] = False
        before = len(policy.requests), len(judge.requests)
        results = evaluate(recipe, recipe.judge, "resume")
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
        results = evaluate(recipe, recipe.judge, "fail")
        due = (PEOPLE + 1) * PEOPLE * 4
        assert len(judge.requests) == PROMPTS * due + 2 * due
        asked_again = [body["messages"] for body in judge.requests if len(body["messages"]) > 1]
        assert {messages[1]["content"] for messages in asked_again} == {"I cannot decide.", "Hmm, rather good."}
        evaluate(recipe, recipe.judge, "resume")
        assert len(judge.requests) == PROMPTS * due + 2 * due
    assert results["status_counts"]["judgments"] == {"m": {"ok": 3 * due, "parse_fail": due}}
    per_split = results["models"]["m"]["own_system"]["per_split"]
    assert per_split["unseen"]["overall"]["mean"] == 4.5
    assert per_split["seen"]["overall"]["coverage"] == 0.5


def test_without_siblings_each_response_is_judged_for_its_person_alone(tmp_path):
    with loopback(obedient) as policy, loopback(strict) as judge:
        models = [{"name": "m", "model": "m", "conditions": ["own_system"]}]
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False, models=models)
        results = evaluate(recipe, recipe.judge, "fail")
        assert len(judge.requests) == PROMPTS * PEOPLE * 4
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
        results = evaluate(recipe, recipe.judge, "fail")
        rooms = {body["max_tokens"] for body in policy.requests if len(body["messages"]) == 1}
    assert len(rooms) > 1 and min(rooms) == 1024
    statuses = results["status_counts"]["generations"]["m"]
    assert statuses == {"truncated": PROMPTS * PEOPLE, "empty": PROMPTS - 1, "unfinished": 1}
    none = results["models"]["m"]["no_system"]["overall"]
    assert (none["mean"], none["coverage"]) == (None, (PROMPTS - 1) / PROMPTS)
    assert results["models"]["m"]["own_system"]["overall"]["coverage"] == 1.0
    unfinished = [row for row in read_jsonl(tmp_path / "out" / "generations.jsonl") if row["status"] == "unfinished"]
    assert "cut at max_tokens" in unfinished[0]["error_message"]


def test_a_judge_that_is_cut_gets_more_room_and_what_was_cut_is_no_verdict(tmp_path):
    def judge_answer(n, body):
        text, room = body["messages"][0]["content"], body["max_tokens"]
        if "Question 0?" in text and room <= 512:
            return chat_reply("<think>A draft: [RESULT] 1\n", "length")
        if "Question 1?" in text and len(body["messages"]) == 1:
            # 10, or 1?
            return chat_reply("Feedback: so. [RESULT] 1", "length")
        if len(body["messages"]) == 3:
            assert room == 1024
            return chat_reply("[RESULT] 4")
        return strict(n, body)

    with loopback(obedient) as policy, loopback(judge_answer) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        results = evaluate(recipe, recipe.judge, "fail")
        due = (PEOPLE + 1) * PEOPLE * 4
        assert len(judge.requests) == PROMPTS * due + 2 * due
    assert results["status_counts"]["judgments"] == {"m": {"ok": PROMPTS * due}}
    assert results["judge_asked_again"] == {"m": due}
    judgments = read_jsonl(tmp_path / "out" / "judgments.jsonl")
    assert {row["score"] for row in judgments if "Question 0?" in prompt_of(row, tmp_path)} == {2, 5}
    assert {row["score"] for row in judgments if "Question 1?" in prompt_of(row, tmp_path)} == {4}


def prompt_of(judgment, folder):
    generations = {row["generation_id"]: row for row in read_jsonl(folder / "out" / "generations.jsonl")}
    return generations[judgment["generation_id"]]["prompt"]


def models_with(weights_id):
    return Reply({"object": "list", "data": [{"id": "m", "object": "model", "weights_id": weights_id}]})


def test_new_weights_under_the_same_name_are_evaluated_anew(tmp_path, capsys):
    listed, answers = models_with("first"), {"policy": obedient}
    with (
        loopback(lambda n, body: answers["policy"](n, body), models=listed) as policy,
        loopback(strict, models=models_with("judge")) as judge,
    ):
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False)
        first = evaluate(recipe, recipe.judge, "fail")
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, recipe.judge, "resume")
        assert "already finished; 0 requests sent" in capsys.readouterr().out
        # Retrained, served under the same name: the same recipe, the same bench.
        listed.body["data"][0]["weights_id"] = "second"
        answers["policy"] = lambda n, body: chat_reply("Hello.")
        second = evaluate(recipe, recipe.judge, "resume")
        assert "already finished" not in capsys.readouterr().out
        assert len(policy.requests) == 2 * sent[0]
        # Back to the first weights: the ledger knows their answers.
        listed.body["data"][0]["weights_id"] = "first"
        third = evaluate(recipe, recipe.judge, "resume")
        assert len(policy.requests) == 2 * sent[0]
    means = [results["models"]["m"]["own_system"]["overall"]["mean"] for results in (first, second, third)]
    assert means == [5.0, 2.0, 5.0]
    assert first["protocol"]["weights"] == {"policy m": "first", "judge": "judge"}
    assert read_manifest(tmp_path / "out")["inputs"]["policy m"]["sha256"] == "first"


def test_unknown_weights_are_said_and_never_taken_for_unchanged(tmp_path, capsys):
    with loopback(obedient) as policy, loopback(strict, models=models_with("judge")) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False)
        results = evaluate(recipe, recipe.judge, "fail")
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, recipe.judge, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
    shown = capsys.readouterr().out
    assert "policy m: the endpoint does not say which weights m is" in shown
    assert "already finished" not in shown
    assert results["protocol"]["weights"] == {"policy m": "unknown", "judge": "judge"}


def test_a_resume_gives_the_same_numbers_also_where_a_judge_answers_equal_requests_differently(tmp_path):
    with loopback(obedient) as policy, loopback(lambda n, body: chat_reply(f"[RESULT] {1 + n % 5}")) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        first = evaluate(recipe, recipe.judge, "fail")
        sent = len(judge.requests)
        assert evaluate(recipe, recipe.judge, "resume") == first
        assert len(judge.requests) == sent


def test_a_report_that_fails_costs_no_number_and_no_request(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **keywords):
        raise ValueError("ParseFatalException:\n$$")

    with loopback(obedient) as policy, loopback(strict) as judge:
        models = [{"name": "m", "model": "m"}, {"name": "none [/red]", "model": "m", "conditions": []}]
        recipe = recipe_for(tmp_path, policy.url, judge.url, models=models)
        with monkeypatch.context() as patched:
            patched.setattr(report_module, "forest_plot", broken)
            with pytest.raises(
                DataError, match=r"the report cannot be drawn .*numbers are in .*results\.json"
            ) as caught:
                evaluate(recipe, recipe.judge, "fail")
        assert "\n" not in str(caught.value)
        assert "5.00" in capsys.readouterr().out
        assert read_json(tmp_path / "out" / "results.json")["models"]["m"]["own_system"]["overall"]["mean"] == 5.0
        # A disk without room for the report.
        with monkeypatch.context() as patched:
            patched.setattr(report_module, "write_text", full_disk)
            with pytest.raises(DataError, match="No space left on device; the numbers are in"):
                evaluate(recipe, recipe.judge, "resume")
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, recipe.judge, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
    assert read_manifest(tmp_path / "out")["counts"]["items"] == PROMPTS * PEOPLE


def full_disk(path, text):
    raise DataError(f"{path}: cannot be written: No space left on device")
