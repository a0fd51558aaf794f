"""How a job ends that is told to, and how it goes on: real processes with Ray clusters of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_ray.data import collect as collecting
from janus_ray.data.collect import collect
from janus_ray.data.recipe import CollectRecipe
from janus_ray.errors import DataError
from janus_ray.llm.ledger import count_finished
from janus_ray.miniature import teacher as miniature_teacher
from janus_ray.miniature.server import TEACHER
from janus_ray.miniature.world import instructions
from janus_ray.store import tables
from janus_ray.store.files import write_jsonl
from janus_ray.store.folder import read_manifest
from tests.loopback import chat_reply, loopback

REPOSITORY = Path(__file__).parents[2]
AGAIN = "run again with --if-exists resume to continue\n"


def write_recipe(folder: Path, url: str) -> Path:
    write_jsonl(folder / "in.jsonl", instructions()[:20])
    recipe = {
        "output_dir": str(folder / "out"),
        "sources": [{"path": str(folder / "in.jsonl")}],
        "teacher": {"base_url": url, "model": TEACHER, "max_concurrency": 4},
        "ray": {"logical_cpus": 4, "object_store_gib": 0.1},
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in recipe.items() if isinstance(value, str)]
    lines += [f"[[sources]]\npath = {json.dumps(recipe['sources'][0]['path'])}"]
    for section in ("teacher", "ray"):
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in recipe[section].items())]
    (folder / "recipe.toml").write_text("\n".join(lines))
    return folder / "recipe.toml"


def start(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    # A proxy that does not exist: neither the teacher nor Ray, both on this machine, may be looked for behind it.
    proxied = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.collect", str(recipe), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **proxied},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_job_that_is_told_to_end_ends_in_one_line_and_a_resume_pays_for_nothing_twice(tmp_path):

    def answer(n, body):
        reply = chat_reply(miniature_teacher.answer(body["messages"], body["seed"]))
        reply.delay_s = 0.1
        return reply

    with loopback(answer, models=(TEACHER,)) as server:
        recipe = write_recipe(tmp_path, server.url)
        # While Ray starts.
        starting = start(recipe)
        assert starting.stdout.readline().startswith("collect: 20 instructions")
        starting.send_signal(signal.SIGTERM)
        assert (starting.wait(60), starting.stderr.read()) == (143, f"terminated; {AGAIN}")
        # At work; Ray's processes get it as well, as from `timeout`, systemd or Ctrl-C on a terminal.
        working = start(recipe, "--if-exists", "resume")
        while count_finished(tmp_path / "out" / "ledger") < 20:
            assert working.poll() is None, working.stderr.read()
            time.sleep(0.05)
        os.killpg(working.pid, signal.SIGTERM)
        assert (working.wait(60), working.stderr.read()) == (143, f"terminated; {AGAIN}")
        assert not (tmp_path / "out" / "manifest.json").exists()
        # Ray's workers notice within seconds that their raylet has gone; what they still ask for is in the ledger too.
        asked = -1
        while asked != len(server.requests):
            asked = len(server.requests)
            time.sleep(1)
        finished = count_finished(tmp_path / "out" / "ledger")
        resumed = start(recipe, "--if-exists", "resume")
        _, err = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, err
    counts = read_manifest(tmp_path / "out")["counts"]
    assert counts["rows_ok"] == 60
    assert counts["requests_sent"] == 140 - finished
    # At most what was in flight when the process died was answered and not recorded.
    assert 140 <= len(server.requests) <= 140 + 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RAY_TMPDIR": "{long}"}, "error: Ray cannot start: its temporary folder has too long a name for sockets"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "error: RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there (Connection"),
        ({"RAY_ADDRESS": "nonsense"}, "error: RAY_ADDRESS=nonsense: Invalid address format"),
    ],
)
def test_ray_that_cannot_start_is_one_line(tmp_path, run_job_process, environment, expected):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    environment = {name: value.format(long=long) for name, value in environment.items()}
    with loopback(lambda n, body: chat_reply(""), models=(TEACHER,)) as server:
        result = run_job_process("collect", str(write_recipe(tmp_path, server.url)), **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(expected) and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_rows_is_one_line_and_a_resume_sends_nothing(tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(collecting, "ray_cluster", lambda *arguments, **keywords: nullcontext())

    def answer(n, body):
        return chat_reply(miniature_teacher.answer(body["messages"], body["seed"]))

    def full(*_, **__):
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    with loopback(answer, models=(TEACHER,)) as server:
        write_recipe(tmp_path, server.url)
        recipe = CollectRecipe.model_validate(
            {
                "sources": [{"path": str(tmp_path / "in.jsonl")}],
                "output_dir": str(tmp_path / "out"),
                "teacher": {"base_url": server.url, "model": TEACHER, "max_concurrency": 4},
            }
        )
        monkeypatch.setattr(tables.pq, "write_table", full)
        with pytest.raises(DataError, match=r"part-00000\.parquet: cannot be written: No space left on device"):
            collect(recipe, "fail")
        monkeypatch.undo()
        monkeypatch.setattr(collecting, "ray_cluster", lambda *arguments, **keywords: nullcontext())
        counts = collect(recipe, "resume")["counts"]
    assert (counts["rows_ok"], counts["requests_sent"]) == (60, 0)
