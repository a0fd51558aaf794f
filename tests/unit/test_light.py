"""What must hold for the repository as a whole: light imports, recipes that parse, commands that exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from janus_ray.config import load_recipe
from janus_ray.job import job_arguments
from janus_ray.serve.config_file import load_served
from janus_ray.submit.command import submit_arguments

REPOSITORY = Path(__file__).parent.parent.parent
LIGHT = [
    "janus_ray",
    "janus_ray.records",
    "janus_ray.config",
    "janus_ray.stats",
    "janus_ray.metrics",
    "janus_ray.store.files",
    "janus_ray.store.tables",
    "janus_ray.store.folder",
    "janus_ray.job",
    "janus_ray.cluster",
    "janus_ray.submitted",
    "janus_ray.serve.gateway",
]
# jobs.submit runs another job on a cluster and has no recipe of its own.
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if path.stem not in ("__init__", "submit"))
RECIPES = sorted((REPOSITORY / "jobs" / "recipes").glob("*.toml"))


def recipe_type_of(job: str) -> type:
    module = importlib.import_module(f"jobs.{job}")
    return module.run.__annotations__["recipe"]


@pytest.mark.parametrize("module", [*LIGHT, *(f"jobs.{job}" for job in JOBS)])
def test_importing_a_light_module_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_for_exactly_one_job(recipe):
    jobs = [job for job in JOBS if parses(recipe, job)]
    assert len(jobs) == 1, f"{recipe.name} parses for {jobs}"


def parses(recipe: Path, job: str) -> bool:
    try:
        load_recipe(recipe_type_of(job), [recipe])
    except ValueError:
        return False
    return True


def commands() -> list[str]:
    """Every `python -m jobs.…` line of the documents and of the jobs' own docstrings."""
    documents = [REPOSITORY / "README.md", REPOSITORY / "jobs" / "README.md", *(REPOSITORY / "jobs").glob("*.py")]
    documents += [*(REPOSITORY / "jobs").glob("*.sh"), REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "docs" / "paper.md"]
    found = {line for path in documents for line in re.findall(r"python -m jobs\.[^\n`&|>()]*", path.read_text())}
    for variable, value in (("$recipes", "jobs/recipes"), ("$port", "8000"), ('"$@"', "")):
        found = {command.replace(variable, value) for command in found}
    return sorted(command.strip() for command in found)


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command):
    _, _, module, *arguments = shlex.split(command, comments=True)
    job = module.removeprefix("jobs.")
    if job == "submit":
        parsed = submit_arguments(JOBS, "").parse_args(arguments)
        job = parsed.job
    else:
        assert job in JOBS, f"no such job: {job}"
        parsed = job_arguments("").parse_args(arguments)
    load = load_served if job == "serve" else load_recipe
    load(recipe_type_of(job), [REPOSITORY / recipe for recipe in parsed.recipes], parsed.overrides)


def test_every_job_can_be_submitted():
    from jobs import submit

    assert sorted([*submit._WITH_A_FOLDER, *submit._WITHOUT]) == JOBS


def test_each_job_is_thin():
    lengths = {job: len((REPOSITORY / "jobs" / f"{job}.py").read_text().splitlines()) for job in JOBS}
    assert max(lengths.values()) < 50, lengths


def test_the_commands_are_found_at_all():
    assert len(commands()) >= len(JOBS)
