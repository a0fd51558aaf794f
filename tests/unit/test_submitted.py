"""What relative paths mean in a job that was submitted to a cluster, and what a job says about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.config import load_recipe, named_paths, validate
from janus_ray.data.recipe import CollectRecipe
from janus_ray.env import QUIET_DEFAULTS, set_quiet_defaults, storage_root
from janus_ray.errors import ConfigError
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.miniature.recipe import BaseModelRecipe, BenchRecipe, InstructionsRecipe
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.submitted import is_output, is_relative, on_storage, under
from janus_ray.train.recipe import TrainRecipe

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "jobs" / "recipes"
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def collect_recipe(path: str, output_dir: str) -> CollectRecipe:
    values = {
        "output_dir": output_dir,
        "sources": [{"path": path}],
        "teacher": {"base_url": "http://127.0.0.1:1/v1", "model": "m"},
    }
    return validate(CollectRecipe, values, "test")


def test_outputs_and_inputs_that_were_not_sent_lie_on_the_storage(monkeypatch, tmp_path):
    monkeypatch.setenv("JANUS_STORAGE", "s3://bucket/team/")
    placed = on_storage(collect_recipe("runs/a/in.jsonl", "runs/out"), lambda path: False)
    assert dict(named_paths(placed)) == {
        "sources.0.path": "s3://bucket/team/runs/a/in.jsonl",
        "output_dir": "s3://bucket/team/runs/out",
    }
    # What was sent is read where it is, also on a storage; what is written never lies there.
    sent = on_storage(collect_recipe("data/in.jsonl", "data"), lambda path: True)
    assert dict(named_paths(sent)) == {"sources.0.path": "data/in.jsonl", "output_dir": "s3://bucket/team/data"}
    # Absolute paths, of whatever kind, are nobody's business.
    absolute = collect_recipe("gs://other/in.jsonl", "/nfs/out")
    assert on_storage(absolute, lambda path: False) is absolute


def test_a_hub_id_stays_one_unless_the_storage_holds_such_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JANUS_STORAGE", str(tmp_path))
    recipe = collect_recipe("org/name", "/nfs/out")
    assert on_storage(recipe, lambda path: False).sources[0].path == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert on_storage(recipe, lambda path: False).sources[0].path == f"{tmp_path}/org/name"
    monkeypatch.delenv("JANUS_STORAGE")
    assert on_storage(recipe, lambda path: False) is recipe


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (("/in.jsonl", "runs/out"), r"output_dir = 'runs/out' is relative and would be lost.*--set output_dir=s3://"),
        (("/in.jsonl", "out"), r"output_dir = 'out' is relative"),
        (("/in.jsonl", "./out/"), r"output_dir = './out/' is relative"),
        (("/in.jsonl", "org/name"), r"output_dir = 'org/name' is relative"),
        (
            ("runs/a/in.jsonl", "/out"),
            r"sources.0.path = 'runs/a/in.jsonl' is relative and was not sent.*JANUS_STORAGE",
        ),
        (("in.jsonl", "s3://b/out"), r"sources.0.path = 'in.jsonl' is relative"),
    ],
)
def test_without_a_storage_relative_paths_are_refused_in_one_line(monkeypatch, recipe, said):
    monkeypatch.delenv("JANUS_STORAGE", raising=False)
    with pytest.raises(ConfigError, match=said) as refused:
        on_storage(collect_recipe(*recipe), lambda path: False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["runs", "bucket/x", "./x", "~/x", "s3:/b/x", "s3//b", "a\nb://x"])
def test_a_storage_that_is_no_place_for_every_node_is_refused(monkeypatch, value):
    monkeypatch.setenv("JANUS_STORAGE", value)
    with pytest.raises(ConfigError, match=r"JANUS_STORAGE=.*expected an address"):
        storage_root()


def test_a_path_that_leads_out_of_the_working_directory_is_refused(monkeypatch):
    monkeypatch.setenv("JANUS_STORAGE", "/nfs/x")
    for path in ("../out", "a/../../out", "./../x", ".."):
        with pytest.raises(ConfigError, match="leads out of the working directory"):
            on_storage(collect_recipe("/in", path), lambda path: False)


@given(st.lists(st.sampled_from(["", ".", "..", "a", "..b", "~", "c d", "ü", "s3:", "\\"]), min_size=1).map("/".join))
@settings(max_examples=60)
def test_whatever_a_relative_path_is_it_ends_up_under_the_root(path):
    if not is_relative(path):
        return
    try:
        placed = under("s3://bucket/x", path)
    except ConfigError:
        return
    assert placed == "s3://bucket/x" or placed.startswith("s3://bucket/x/")
    assert ".." not in placed.removeprefix("s3://").split("/")


def test_every_path_field_of_every_recipe_is_known_as_input_or_output():
    recipes = {
        "miniature_collect": CollectRecipe,
        "miniature_sft": TrainRecipe,
        "miniature_serve": ServeRecipe,
        "miniature_evaluate": EvaluateRecipe,
        "miniature_model": BaseModelRecipe,
        "miniature_bench": BenchRecipe,
        "miniature_instructions": InstructionsRecipe,
    }
    found = {
        (name, field): is_output(field)
        for name, recipe in recipes.items()
        for field, _ in named_paths(load_recipe(recipe, [RECIPES / f"{name}.toml"]))
    }
    inputs = {field for (_, field), output in found.items() if not output}
    outputs = {field for (_, field), output in found.items() if output}
    # A new field of either kind has to be entered here, and in janus_ray/submitted.py where it is an output.
    assert inputs == {"sources.0.path", "collection", "base_model", "models.0.path", "models.1.path", "bench"}
    assert outputs == {"output_dir", "output_path"}


def run(job: str, *arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JANUS_")}
    env |= {"PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_submitted_job_refuses_before_anything_starts_and_says_what_it_would_do(tmp_path):
    recipe = str(RECIPES / "miniature_collect.toml")
    submitted = {SUBMITTED: json.dumps({"runtime_env": {}, "metadata": {}})}
    refused = run("collect", recipe, cwd=tmp_path, **submitted)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("error: sources.0.path = 'runs/miniature/instructions.jsonl' is relative")
    assert list(tmp_path.iterdir()) == []
    placed = run("collect", recipe, "--dry-run", cwd=tmp_path, **submitted, JANUS_STORAGE="s3://b/x")
    assert json.loads(placed.stdout)["output_dir"] == "s3://b/x/runs/miniature/collection"
    # A job that a person starts is left alone.
    alone = run("collect", recipe, "--dry-run", cwd=tmp_path, JANUS_STORAGE="s3://b/x")
    assert json.loads(alone.stdout)["output_dir"] == "runs/miniature/collection"


def test_a_job_without_a_folder_refuses_what_it_would_ignore():
    recipe = str(RECIPES / "miniature_serve.toml")
    refused = run("serve", recipe, "--if-exists", "resume")
    assert refused.returncode == 2
    assert refused.stderr == "error: unrecognized arguments: --if-exists resume (--help lists what is taken)\n"


def test_a_cluster_that_was_running_is_not_told_how_to_authenticate(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for address in ("10.0.0.1:6379", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        set_quiet_defaults()
        assert "RAY_AUTH_MODE" not in os.environ
    set_quiet_defaults(own_cluster=False)
    assert "RAY_AUTH_MODE" not in os.environ
    # Not through its workers either.
    assert not any("AUTH" in name for name in QUIET_DEFAULTS)
    # A cluster of our own is; and what the user said stands.
    monkeypatch.setenv("RAY_ADDRESS", "local")
    set_quiet_defaults()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    set_quiet_defaults()
    assert os.environ["RAY_AUTH_MODE"] == "token"
