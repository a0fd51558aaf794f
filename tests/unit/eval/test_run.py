"""The whole evaluation with its requests sent from this process instead of Ray actors, against loopback endpoints."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path

import pytest

from janus_ray.errors import ConfigError, DataError
from janus_ray.eval import outcomes, run
from janus_ray.eval import report as report_module
from janus_ray.eval.run import evaluate
from janus_ray.llm.fanout import EndpointClient, told_apart
from janus_ray.store.files import read_json
from janus_ray.store.folder import read_manifest
from janus_ray.store.location import location
from janus_ray.store.tables import read_jsonl
from tests.evaluation import PEOPLE, RUBRICS, models_with, obedient, recipe_for, strict
from tests.loopback import chat_reply, loopback


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def ask_all(requests, target, ledger, num_actors, label, *, total):
        async def ask():
            client = EndpointClient(target.model_dump(mode="json"), str(ledger), target.max_concurrency)
            given = list(told_apart(requests))
            assert len(given) == total
            answers = await client.answer([numbered for _, numbered in given])
            await client.close()
            return [(asked, outcome) for (asked, _), outcome in zip(given, answers.results, strict=True)]

        return reversed(asyncio.run(ask()))

    monkeypatch.setattr(run, "ray_cluster", lambda *arguments, **keywords: nullcontext())
    monkeypatch.setattr(outcomes, "ask_all", ask_all)


def test_a_judge_that_is_cut_gets_more_room_and_what_was_cut_is_no_verdict(tmp_path):
    def judge_answer(n, body):
        text, room = body["messages"][0]["content"], body["max_tokens"]
        if "Question 0?" in text and room <= 512:
            return chat_reply("<think>A draft: [RESULT] 1\n", "length")
        if "Question 1?" in text and len(body["messages"]) == 1:
            # 10, or 1, or 1.5?
            return chat_reply(f"Feedback: so. [RESULT] 1{'. '[n % 3 : n % 3 + 1]}", "length")
        if len(body["messages"]) == 3:
            assert room == 1024
            return chat_reply("[RESULT] 4")
        return strict(n, body)

    with loopback(obedient) as policy, loopback(judge_answer) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url, max_prompts_per_split=1)
        results = evaluate(recipe, "fail").as_json()
        due = (PEOPLE + 1) * PEOPLE * RUBRICS
        assert len(judge.requests) == 2 * due + 2 * due
    assert results["status_counts"]["judgments"] == {"m": {"ok": 2 * due}}
    assert results["judge_asked_again"] == {"m": due}
    judgments = read_jsonl(tmp_path / "out" / "judgments.jsonl")
    assert {row["score"] for row in judgments if "Question 0?" in prompt_of(row, tmp_path)} == {2, 5}
    assert {row["score"] for row in judgments if "Question 1?" in prompt_of(row, tmp_path)} == {4}


def prompt_of(judgment, folder):
    generations = {row["generation_id"]: row for row in read_jsonl(folder / "out" / "generations.jsonl")}
    return generations[judgment["generation_id"]]["prompt"]


def test_new_weights_under_the_same_name_are_evaluated_anew(tmp_path, capsys):
    listed, answers = models_with("first"), {"policy": obedient}
    with (
        loopback(lambda n, body: answers["policy"](n, body), models=listed) as policy,
        loopback(strict, models=models_with("judge")) as judge,
    ):
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False)
        first = evaluate(recipe, "fail").as_json()
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, "resume")
        assert "already finished; 0 requests sent" in capsys.readouterr().out
        # Retrained, served under the same name: the same recipe, the same bench.
        listed.body["data"][0]["weights_id"] = "second"
        answers["policy"] = lambda n, body: chat_reply("Hello.")
        second = evaluate(recipe, "resume").as_json()
        shown = capsys.readouterr().out
        assert "policy m: other weights answer under that name" in shown and "already finished" not in shown
        assert len(policy.requests) == 2 * sent[0]
        # Back to the first weights: the ledger knows their answers.
        listed.body["data"][0]["weights_id"] = "first"
        third = evaluate(recipe, "resume").as_json()
        assert len(policy.requests) == 2 * sent[0]
        # Other questions are refused, here as in every stage.
        Path(recipe.bench).write_text(Path(recipe.bench).read_text() + "\n")
        with pytest.raises(ConfigError, match=r"was made from other inputs \(changed since: bench "):
            evaluate(recipe, "resume")
    means = [results["models"]["m"]["own_system"]["overall"]["mean"] for results in (first, second, third)]
    assert means == [5.0, 2.0, 5.0]
    assert first["protocol"]["weights"] == {"policy m": "first", "judge": "judge"}
    assert read_manifest(tmp_path / "out")["inputs"]["policy m"]["revision"] == "first"


def test_unknown_weights_are_said_and_never_taken_for_unchanged(tmp_path, capsys):
    with loopback(obedient) as policy, loopback(strict, models=models_with("judge")) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url, judge_siblings=False)
        results = evaluate(recipe, "fail").as_json()
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
    shown = capsys.readouterr().out
    assert "policy m: the endpoint does not say which weights m is" in shown
    assert "already finished" not in shown
    assert results["protocol"]["weights"] == {"policy m": "unknown", "judge": "judge"}


def test_a_resume_gives_the_same_numbers_also_where_a_judge_answers_equal_requests_differently(s3):
    """With everything on an object storage."""
    folder = location(s3.folder())
    with loopback(obedient) as policy, loopback(lambda n, body: chat_reply(f"[RESULT] {1 + n % 5}")) as judge:
        recipe = recipe_for(folder, policy.url, judge.url, judge_siblings=False)
        first = evaluate(recipe, "fail").as_json()
        sent = len(judge.requests)
        rows = [(folder / "out" / name).read_bytes() for name in ("generations.jsonl", "judgments.jsonl")]
        assert evaluate(recipe, "resume").as_json() == first
        assert len(judge.requests) == sent
    assert rows == [(folder / "out" / name).read_bytes() for name in ("generations.jsonl", "judgments.jsonl")]
    # In the bench's order, whatever that of the answers.
    asked = [(row["prompt"], row["system"]) for row in read_jsonl(folder / "bench.jsonl")]
    generations = read_jsonl(folder / "out" / "generations.jsonl")
    assert [(row["prompt"], row["system"]) for row in generations if row["system"]] == asked
    judgments = read_jsonl(folder / "out" / "judgments.jsonl")
    assert [row["rubric"] for row in judgments] == [0, 1] * (len(judgments) // 2)
    assert (folder / "out" / "index.html").stat().st_size > 10_000
    assert read_manifest(folder / "out")["counts"] == {"items": 12, "generations": 16, "judgments": len(judgments)}


def test_a_report_that_fails_costs_no_number_and_no_request(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **keywords):
        raise ValueError("ParseFatalException:\n$$")

    with loopback(obedient) as policy, loopback(strict) as judge:
        models = [{"name": "m", "model": "m"}, {"name": "none [/red]", "model": "m", "conditions": []}]
        recipe = recipe_for(tmp_path, policy.url, judge.url, models=models, max_prompts_per_split=1)
        with monkeypatch.context() as patched:
            patched.setattr(report_module, "forest_plot", broken)
            with pytest.raises(
                DataError, match=r"the report cannot be drawn .*numbers are in .*results\.json"
            ) as caught:
                evaluate(recipe, "fail")
        assert "\n" not in str(caught.value)
        assert "5.00" in capsys.readouterr().out
        assert read_json(tmp_path / "out" / "results.json")["models"]["m"]["own_system"]["overall"]["mean"] == 5.0
        # A disk without room for the report.
        with monkeypatch.context() as patched:
            patched.setattr(report_module, "write_text", full_disk)
            with pytest.raises(DataError, match="No space left on device; the numbers are in"):
                evaluate(recipe, "resume")
        sent = len(policy.requests), len(judge.requests)
        evaluate(recipe, "resume")
        assert (len(policy.requests), len(judge.requests)) == sent
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
    assert read_manifest(tmp_path / "out")["counts"]["items"] == 2 * PEOPLE


def full_disk(path, text):
    raise DataError(f"{path}: cannot be written: No space left on device")


def test_while_answers_are_awaited_no_half_file_lies_there_for_a_killed_process_to_leave(tmp_path, monkeypatch):
    found = []

    def ask_all(*arguments, **keywords):
        found.extend(path.name for path in (tmp_path / "out").iterdir())
        raise DataError("the disk is full")

    monkeypatch.setattr(outcomes, "ask_all", ask_all)
    with loopback(obedient) as policy, loopback(strict) as judge:
        recipe = recipe_for(tmp_path, policy.url, judge.url)
        with pytest.raises(DataError, match="the disk is full"):
            evaluate(recipe, "fail")
    assert "recipe.json" in found and not [name for name in found if "generations" in name]
