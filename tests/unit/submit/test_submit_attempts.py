"""The name of a job on a cluster, what a repeat does, and how an end becomes an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.config import load_recipe
from janus_ray.data.recipe import CollectRecipe
from janus_ray.errors import ConfigError
from janus_ray.submit.attempts import job_name, plan
from janus_ray.submit.command import _recipes_as_sent, _sent, _variables
from janus_ray.submit.dashboard import Known
from janus_ray.submit.follow import Log, _ended

REPOSITORY = Path(__file__).parents[3]
RECIPE = REPOSITORY / "jobs" / "recipes" / "miniature_collect.toml"


def name(*overrides: str) -> str:
    return job_name("collect", load_recipe(CollectRecipe, [RECIPE], overrides))


def test_a_job_is_named_by_its_result_and_its_place_not_by_how_hard_it_works():
    assert name() == name("teacher.max_concurrency=3", "client_actors=2", "ray.logical_cpus=9")
    assert len({name(), name("seed=1"), name("output_dir=elsewhere"), name("sources.0.path=b.jsonl")}) == 4
    assert name().startswith("janus-collect-") and len(name()) == len("janus-collect-") + 12


@pytest.mark.parametrize(
    ("statuses", "if_exists", "expected"),
    [
        ([], None, ("submit", "j", None, None)),
        ([], "overwrite", ("submit", "j", "overwrite", None)),
        (["PENDING"], None, ("follow", "j", None, None)),
        (["RUNNING"], "resume", ("follow", "j", None, None)),
        (["RUNNING"], "fail", ("follow", "j", None, None)),
        (["FAILED"], None, ("submit", "j-2", "resume", "FAILED")),
        (["STOPPED"], None, ("submit", "j-2", "resume", "STOPPED")),
        (["FAILED", "STOPPED"], "overwrite", ("submit", "j-3", "overwrite", "STOPPED")),
        (["FAILED", "RUNNING"], None, ("follow", "j-2", None, None)),
        (["SUCCEEDED"], None, ("finished", "j", None, None)),
        (["FAILED", "SUCCEEDED"], None, ("finished", "j-2", None, None)),
        (["SUCCEEDED"], "resume", ("submit", "j-2", "resume", "SUCCEEDED")),
    ],
)
def test_a_repeat_follows_leaves_alone_or_resumes(statuses, if_exists, expected):
    assert tuple(plan("j", statuses, if_exists, writes_folder=True)) == expected


def test_a_job_without_a_folder_is_run_again_and_told_nothing_of_one():
    assert tuple(plan("j", ["SUCCEEDED"], None, writes_folder=False)) == ("submit", "j-2", None, "SUCCEEDED")
    assert tuple(plan("j", ["RUNNING"], None, writes_folder=False)) == ("follow", "j", None, None)


def test_what_is_being_written_is_not_overwritten():
    with pytest.raises(ConfigError, match=r"j-2 is running and writes there; stop it before it is overwritten"):
        plan("j", ["FAILED", "RUNNING"], "overwrite", writes_folder=True)


@pytest.mark.parametrize(
    ("known", "code", "said"),
    [
        (Known("j", "SUCCEEDED"), 0, "j has finished"),
        (Known("j", "STOPPED"), 143, "j was stopped; the same command continues it"),
        (Known("j", "FAILED", exit_code=2), 2, "j has ended with exit code 2"),
        (Known("j", "FAILED", exit_code=-9), 137, "j has ended with exit code 137"),
        (Known("j", "FAILED", exit_code=0), 1, "j has ended with exit code 0"),
        (Known("j", "FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED"), 1, "j has failed: the node that it ran on has"),
        (Known("j", "FAILED", "no\nroom", "SOMETHING_NEW"), 1, "j has failed: no room; the same command"),
        (Known("j", "FAILED"), 1, "j has failed: nobody knows why"),
    ],
)
def test_only_success_is_success(capsys, known, code, said):
    assert _ended(known) == code
    printed = capsys.readouterr().out
    assert printed.startswith(f"submit: {said}") and printed.count("\n") == 1


@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=4), st.integers(1, 7))
@settings(max_examples=60)
def test_a_log_is_printed_once_however_often_the_connection_is_cut(text, cuts, piece):
    printed: list[str] = []
    log = Log(printed.append)
    for cut in [*cuts, len(text)]:
        log.again()
        for start in range(0, min(cut, len(text)), piece):
            log.take(text[start : min(start + piece, cut)])
    assert "".join(printed) == text


def test_a_recipe_that_lies_elsewhere_is_sent_along(tmp_path):
    (tmp_path / "work" / "recipes").mkdir(parents=True)
    inside, outside = tmp_path / "work" / "recipes" / "in.toml", tmp_path / "out.toml"
    inside.write_text("a = 1")
    outside.write_text("b = 2")
    names, more = _recipes_as_sent([str(inside), str(outside)], tmp_path / "work", {"recipes/in.toml"})
    assert names == ["recipes/in.toml", "submitted_recipes/1-out.toml"]
    assert more == {"submitted_recipes/1-out.toml": b"b = 2"}
    # Inside, but left out of what is sent.
    assert _recipes_as_sent([str(inside)], tmp_path / "work", set())[0] == ["submitted_recipes/0-in.toml"]


def test_what_was_sent_is_a_file_or_a_folder_with_one():
    sent = _sent(["data/a/x.jsonl", "y.jsonl"])
    assert [sent(path) for path in ("data", "data/a", "./data/a/", "y.jsonl", "data/a/x.jsonl")] == [True] * 5
    assert not any(sent(path) for path in ("dat", "data/b", "x.jsonl", "../y.jsonl"))


def test_variables_go_along_by_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("JANUS_STORAGE", "s3://b/x/")
    assert _variables(["OPENAI_API_KEY"]) == {"OPENAI_API_KEY": "secret", "JANUS_STORAGE": "s3://b/x"}
    with pytest.raises(ConfigError, match="--env ABSENT: is not set in this shell"):
        _variables(["ABSENT"])


@contextmanager
def answering(status: int, body: str):
    """A web server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ASK = """
import sys
from janus_ray.errors import JanusError
from janus_ray.submit.dashboard import connected
for address in sys.argv[1:]:
    try:
        connected(address)
    except JanusError as error:
        print(error)
"""


def test_every_wrong_address_is_one_line(tmp_path):
    with (
        answering(200, "<html>") as page,
        answering(200, json.dumps({"ray_version": "1.2.3"})) as old,
        answering(200, json.dumps([1])) as array,
        answering(404, "no") as missing,
        answering(401, "who") as locked,
        answering(403, "no") as forbidden,
    ):
        addresses = [page, old, array, missing, locked, forbidden]
        more = ["127.0.0.1:1", "ray://h:10001", "s3://b/x", "http://", "http://[", "http://no-such-host.invalid:8265"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # Ray's own client would go there, whatever it is told.
        environment |= {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", ASK, *addresses, *more]
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    said = asked.stdout.splitlines()
    not_one = "what answers there is not the dashboard of a Ray cluster; the dashboard's port is 8265"
    expected = [
        f"{page}: {not_one}",
        f"{old}: its cluster runs Ray 1.2.3, this environment has ",
        f"{array}: {not_one}",
        f"{missing}: {not_one}",
        f"{locked}: the cluster asks for a token; set RAY_AUTH_MODE=token",
        f"{forbidden}: the cluster does not take our token; set RAY_AUTH_MODE=token",
        "http://127.0.0.1:1: no dashboard of a Ray cluster answers there (connection refused)",
        "ray://h:10001: is a Ray Client address; jobs go to the dashboard",
        "s3://b/x: expected the address of a dashboard",
        "http:: no dashboard of a Ray cluster answers there",
        "http://[: no dashboard of a Ray cluster answers there",
        "http://no-such-host.invalid:8265: no dashboard of a Ray cluster answers there (",
    ]
    assert len(said) == len(expected), said
    assert [line for line, start in zip(said, expected, strict=True) if not line.startswith(start)] == []


def test_the_token_is_found_as_ray_finds_it(monkeypatch, tmp_path):
    from janus_ray.env import ray_token

    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "TOKEN")
    with pytest.raises(ConfigError, match=r"auth_token: No such file or directory; set RAY_AUTH_TOKEN"):
        ray_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert ray_token() == "at home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        ray_token()
    (tmp_path / "file").write_text("in a file")
    assert ray_token() == "in a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "said")
    assert ray_token() == "said"


def test_a_recipe_that_is_wrong_is_found_before_anything_is_sent(tmp_path):
    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.submit", *arguments, "--address", "127.0.0.1:1"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)

    for arguments, said in [
        (["collect", "absent.toml"], "error: recipe absent.toml: no such file\n"),
        (["serve", "jobs/recipes/miniature_serve.toml", "--if-exists", "resume"], "error: --if-exists: serve has no"),
        (
            ["collect", "x.toml", "--entrypoint-cpus", "nan"],
            "error: argument --entrypoint-cpus: nan: expected a number",
        ),
    ]:
        refused = submit(*arguments)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert refused.stderr.startswith(said)
