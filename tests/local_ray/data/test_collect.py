"""Collection on a real Ray cluster, against the miniature's teacher and against faults."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pyarrow.parquet as pq
import pytest

from janus_ray.data.collect import collect
from janus_ray.data.recipe import CollectRecipe
from janus_ray.errors import ConfigError, DataError, GenerationError
from janus_ray.llm.ledger import count_finished
from janus_ray.miniature import teacher as miniature_teacher
from janus_ray.miniature.server import TEACHER
from janus_ray.miniature.world import instructions
from janus_ray.provider import providers_running
from janus_ray.records import COLLECTION
from janus_ray.store.files import write_jsonl
from janus_ray.store.folder import read_manifest
from janus_ray.store.tables import read_parquet
from tests.loopback import Reply, chat_reply, loopback

REPOSITORY = Path(__file__).parents[3]


def recipe_for(folder: Path, num_instructions: int, **changes) -> CollectRecipe:
    write_jsonl(folder / "in.jsonl", instructions()[:num_instructions])
    teacher = {"provider": "miniature", "model": TEACHER, "max_concurrency": 8, **changes.pop("teacher", {})}
    return CollectRecipe.model_validate(
        {
            "sources": [{"path": str(folder / "in.jsonl"), "source_column": "family"}],
            "output_dir": str(folder / "out"),
            "teacher": teacher,
            "ray": {"logical_cpus": 4, "object_store_gib": 0.3},
            **changes,
        }
    )


def sorted_rows(folder: Path) -> list[dict]:
    return read_parquet(folder).sort_by([("prompt_id", "ascending"), ("set_index", "ascending")]).to_pylist()


@pytest.fixture
def in_the_shared_cluster(monkeypatch):
    """`collect` connects to the session's cluster instead of starting and ending one of its own."""
    from contextlib import nullcontext

    from janus_ray.data import collect as module

    monkeypatch.setattr(module, "ray_cluster", lambda *arguments, **keywords: nullcontext())


def test_a_collection_loads_everywhere_and_a_rerun_sends_nothing(tmp_path, in_the_shared_cluster, capsys):
    recipe = recipe_for(tmp_path, 40, rows_per_file=50)
    with providers_running(recipe):
        manifest = collect(recipe, "fail")
        assert manifest["counts"]["rows_ok"] == 120
        assert manifest["counts"]["requests_sent"] == 40 * 7
        files = sorted((tmp_path / "out").glob("*.parquet"))
        assert [pq.read_metadata(file).num_rows for file in files] == [50, 50, 20]
        assert all(pq.read_schema(file).equals(COLLECTION) for file in files)
        loaded = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(tmp_path / "cache")
        )
        assert loaded.num_rows == 120
        assert loaded[0]["preference_set"][0]["dimension"] == "style"
        rows = sorted_rows(tmp_path / "out")
        assert len({row["row_id"] for row in rows}) == 120
        capsys.readouterr()
        collect(recipe, "resume")
        assert "0 requests sent" in capsys.readouterr().out
        # Also when the manifest is lost: the ledger knows every answer.
        (tmp_path / "out" / "manifest.json").unlink()
        again = collect(recipe, "resume")
    assert again["counts"]["requests_sent"] == 0
    assert sorted_rows(tmp_path / "out") == rows


def test_failed_rows_are_counted_rows_and_a_resume_asks_for_them_alone(tmp_path, in_the_shared_cluster):
    app_answers = {"broken": True}

    from janus_ray.miniature import teacher as miniature_teacher

    def answer(n, body):
        messages = body["messages"]
        is_response = messages[0]["role"] == "system"
        if app_answers["broken"] and is_response and n % 2:
            return Reply({"error": {"message": "not today"}}, 400)
        return chat_reply(miniature_teacher.answer(messages, body["seed"]))

    with loopback(answer, models=(TEACHER,)) as server:
        recipe = recipe_for(tmp_path, 10, teacher={"base_url": server.url})
        counts = collect(recipe, "fail")["counts"]
        assert counts["rows_ok"] + counts["rows_failed"] == 30
        assert counts["failures"] == {"bad_request": counts["rows_failed"]}
        assert counts["rows_failed"] > 0
        failed = [row for row in sorted_rows(tmp_path / "out") if row["status"] == "error"]
        assert len(failed) == counts["rows_failed"]
        assert all(
            row["system"] and row["error_message"] == "HTTP 400: not today" and not row["output"] for row in failed
        )
        app_answers["broken"] = False
        again = collect(recipe, "resume")["counts"]
    assert (again["rows_ok"], again["rows_failed"], again["requests_sent"]) == (30, 0, len(failed))


def test_the_whole_limit_is_used_with_any_number_of_actors_also_on_a_short_resume(tmp_path, in_the_shared_cluster):
    """The endpoint holds its answers until the limit is reached: one actor with its share would never get there."""

    def answer(n, body):
        if broken["now"] and body["messages"][0]["role"] == "system":
            return Reply({"error": {"message": "not today"}}, 400)
        return chat_reply(miniature_teacher.answer(body["messages"], body["seed"]))

    broken = {"now": True}
    with loopback(answer, models=(TEACHER,), held_until_in_flight=7) as server:
        there = {"base_url": server.url, "max_concurrency": 7}
        recipe = recipe_for(tmp_path, 8, num_sets=1, client_actors=3, teacher=there)
        with pytest.raises(GenerationError):
            collect(recipe, "fail")
        assert (server.peak_in_flight, server.gave_up_holding) == (7, False)
        broken["now"] = False
        server.peak_in_flight = 0
        assert collect(recipe, "resume")["counts"]["requests_sent"] == 8
        assert (server.peak_in_flight, server.gave_up_holding) == (7, False)


def test_a_collection_without_one_good_row_is_an_error(tmp_path, in_the_shared_cluster):
    broken = {"now": True}

    def answer(n, body):
        from janus_ray.miniature import teacher as miniature_teacher

        text = miniature_teacher.answer(body["messages"], body["seed"])
        return Reply({"error": {"message": "no credit"}}, 403) if broken["now"] else chat_reply(text)

    with loopback(answer, models=(TEACHER,)) as server:
        recipe = recipe_for(tmp_path, 3, teacher={"base_url": server.url})
        with pytest.raises(GenerationError, match=r"all 9 rows failed, the first with: HTTP 403: no credit$"):
            collect(recipe, "fail")
        assert not (tmp_path / "out" / "manifest.json").exists()
        broken["now"] = False
        assert collect(recipe, "resume")["counts"]["rows_ok"] == 9


def test_a_ledger_that_cannot_be_written_ends_the_job_in_one_line_and_a_resume_finishes_it(
    tmp_path, in_the_shared_cluster, capsys
):
    """The endpoint takes no response_format: found once by each client process, said once by the job."""
    state = {"down": True}

    def answer(n, body):
        if state["down"]:
            return Reply({"error": {"message": "not yet"}}, 403)
        if "response_format" in body:
            return Reply({"error": {"message": "unknown parameter", "param": "response_format"}}, 400)
        return chat_reply(miniature_teacher.answer(body["messages"], body["seed"]))

    listed = Reply({"data": [{"id": TEACHER, "weights_id": "first"}]})
    with loopback(answer, models=listed) as server:
        recipe = recipe_for(tmp_path, 3, teacher={"base_url": server.url})
        with pytest.raises(GenerationError, match="not yet"):
            collect(recipe, "fail")
        state["down"] = False
        ledger = tmp_path / "out" / "ledger"
        shutil.rmtree(ledger)
        ledger.write_text("in the way")
        with pytest.raises(DataError, match=r"cannot be recorded: .* --if-exists resume: what was recorded is not ask"):
            collect(recipe, "resume")
        ledger.unlink()
        capsys.readouterr()
        paid = len(server.requests)
        assert collect(recipe, "resume")["counts"]["rows_ok"] == 9
        said = [line for line in capsys.readouterr().out.splitlines() if "response_format" in line]
        assert len(said) == 1
        assert collect(recipe, "resume")["counts"]["requests_sent"] == len(server.requests) - paid
        # A teacher that was trained anew under its name is another teacher.
        listed.body = {"data": [{"id": TEACHER, "weights_id": "second"}]}
        with pytest.raises(ConfigError, match=r"was made from other inputs \(changed since: teacher http"):
            collect(recipe, "resume")
    assert "refuses response_format json_schema and json_object" in said[0]


def test_a_job_killed_half_way_and_resumed_ends_with_the_same_rows(tmp_path, in_the_shared_cluster):
    """kill -9 of the job and of all its processes, then a resume: no finished request is sent twice."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-m", "janus_ray.miniature.server", "--until-stdin-closes", "--latency-ms", "40"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        assert server.stdin and server.stdout
        url = server.stdout.readline().strip()
        job = write_job(tmp_path / "killed", recipe_for(tmp_path / "killed", 60, teacher={"base_url": url}))
        ledger = tmp_path / "killed" / "out" / "ledger"
        process = subprocess.Popen(job, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while count_finished(ledger) < 150 and time.monotonic() < deadline:
            time.sleep(0.05)
        kill_with_descendants(process)
        finished = count_finished(ledger)
        assert 150 <= finished < 420, "the job should have been killed half way"
        assert not (tmp_path / "killed" / "out" / "manifest.json").exists()
        resumed = subprocess.run([*job, "--if-exists", "resume"], cwd=REPOSITORY, capture_output=True, text=True)
        assert resumed.returncode == 0, resumed.stderr
        whole = recipe_for(tmp_path / "whole", 60, teacher={"base_url": url})
        collect(whole, "fail")
        server.stdin.close()
    counts = read_manifest(tmp_path / "killed" / "out")["counts"]
    # What was in flight when the process died, at most the limit of 8, may have been answered and not recorded.
    assert counts["requests_sent"] == 420 - finished
    ours, theirs = sorted_rows(tmp_path / "killed" / "out"), sorted_rows(tmp_path / "whole" / "out")
    assert [{**row, "attempts": 0} for row in ours] == [{**row, "attempts": 0} for row in theirs]
    assert len(ours) == 180


def kill_with_descendants(process: subprocess.Popen) -> None:
    """SIGKILL to the job and to everything it started, Ray's own processes included, all at once."""
    doomed = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in doomed:
        os.kill(each.pid, signal.SIGSTOP)
    for each in doomed:
        os.kill(each.pid, signal.SIGKILL)
    process.wait()


def write_job(folder: Path, recipe: CollectRecipe) -> list[str]:
    lines = [
        f'output_dir = "{recipe.output_dir}"',
        "[[sources]]",
        f'path = "{recipe.sources[0].path}"',
        'source_column = "family"',
        "[teacher]",
        f'base_url = "{recipe.teacher.base_url}"' if recipe.teacher.base_url else 'provider = "miniature"',
        f'model = "{TEACHER}"',
        "max_concurrency = 8",
        "[ray]",
        "logical_cpus = 4",
        "object_store_gib = 0.3",
    ]
    (folder / "recipe.toml").write_text("\n".join(lines))
    return [sys.executable, "-m", "jobs.collect", str(folder / "recipe.toml")]


def test_a_plan_that_does_not_fit_is_refused_instead_of_waiting_for_ever(tmp_path, run_job_process):
    job = write_job(tmp_path, recipe_for(tmp_path, 5))
    result = run_job_process("collect", job[-1], "--set", "client_actors=9")
    assert result.returncode == 2
    assert "collect with 9 client actors needs 9 CPUs at once, this cluster has 4" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_is_down_stops_the_job_before_it_writes_rows(tmp_path, run_job_process):
    recipe = recipe_for(tmp_path, 5, teacher={"base_url": "http://127.0.0.1:9/v1"})
    command = write_job(tmp_path, recipe)
    result = run_job_process("collect", command[-1])
    assert result.returncode == 2
    assert result.stderr.startswith("error: teacher: http://127.0.0.1:9/v1 cannot be reached")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
