from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from janus_ray.config import Recipe, load_recipe, resolved
from janus_ray.errors import ConfigError


class Inner(Recipe):
    size: int = Field(default=1, ge=1)
    """Size in things."""


class Outer(Recipe):
    name: str
    """A name."""
    inner: Inner = Inner()
    """A section."""
    entries: list[Inner] = Field(default_factory=list)
    """Sections."""


def write(path, text):
    path.write_text(text)
    return path


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path):
    first = write(tmp_path / "a.toml", 'name = "a"\n[inner]\nsize = 2\n')
    second = write(tmp_path / "b.toml", 'name = "b"\n')
    assert resolved(load_recipe(Outer, [first, second]))["name"] == "b"
    assert load_recipe(Outer, [first, second]).inner.size == 2
    assert load_recipe(Outer, [first], ["inner.size=7", "name=plain text"]) == Outer(
        name="plain text", inner=Inner(size=7)
    )


@pytest.mark.parametrize(
    ("toml", "overrides", "expected"),
    [
        ("", [], "name: is required"),
        ('name = "a"\nnmae = "b"', [], "nmae: unknown key; allowed: name, inner, entries"),
        ('name = "a"\n[inner]\nsice = 1', [], "inner.sice: unknown key; allowed: size"),
        ('name = "a"\n[[entries]]\nsice = 1', [], "entries.0.sice: unknown key; allowed: size"),
        ('name = "a"', ["inner.size=0"], "inner.size: Input should be greater than or equal to 1 (got 0)"),
        ('name = "a"', ["inner.size"], "--set inner.size: expected the form section.field=value"),
        ('name = "a', [], "not valid TOML"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_and_what_is_allowed(tmp_path, toml, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_recipe(Outer, [write(tmp_path / "r.toml", toml)], overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named():
    with pytest.raises(ConfigError, match=r"recipe nowhere.toml: no such file"):
        load_recipe(Outer, ["nowhere.toml"])


def job(tmp_path, *arguments):
    script = write(
        tmp_path / "job.py",
        "import sys\n"
        "from janus_ray.config import Recipe; from janus_ray.job import run_job\n"
        "from janus_ray.errors import DataError\n"
        "class R(Recipe):\n    n: int = 0\n    'A number.'\n"
        "def run(recipe, if_exists):\n"
        "    if recipe.n == 1: raise DataError('row 7: broken')\n"
        "    if recipe.n == 2: raise RuntimeError('ours')\n"
        "    print('ran', recipe.n, if_exists)\n"
        "run_job(R, run, 'doc')\n",
    )
    recipe = write(tmp_path / "r.toml", "n = 5\n")
    command = [sys.executable, str(script), str(recipe), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_exit_codes_of_a_job(tmp_path):
    assert job(tmp_path).stdout == "ran 5 fail\n"
    assert json.loads(job(tmp_path, "--dry-run", "--set", "n=9").stdout) == {"n": 9}
    failed = job(tmp_path, "--set", "n=1")
    assert (failed.returncode, failed.stderr) == (2, "error: row 7: broken\n")
    bug = job(tmp_path, "--set", "n=2")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
