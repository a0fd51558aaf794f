from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from janus_ray.config import PathText, Recipe, load_recipe, resolved, validate
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
    share: float = 0.5
    """A number."""
    pair: tuple[float, float] = (0.0, 1.0)
    """Two numbers."""
    path: PathText = "."
    """A folder."""
    api_key_env: str | None = Field(default=None, pattern="^[A-Z_]+$")
    """A variable."""


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
        (
            'name = "a"\nnmae = "b"',
            [],
            "nmae: unknown key; allowed: name, inner, entries, share, pair, path, api_key_env",
        ),
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


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("inner.size = true", "inner.size: Input should be a valid integer (got True)"),
        ('inner.size = "5"', "inner.size: Input should be a valid integer (got '5')"),
        ("inner.size = 1.5", "inner.size: Input should be a valid integer (got 1.5)"),
        ("inner.size = 0x" + "f" * 6000, "inner.size: a number so large cannot be meant"),
        ("inner.size = " + "9" * 6000, "holds a number or date that cannot be read"),
        ("share = nan", "share: Input should be a finite number (got nan)"),
        ("share = -inf", "share: Input should be a finite number (got -inf)"),
        ("share = 1e400", "share: Input should be a finite number (got inf)"),
        ("share = false", "share: Input should be a valid number (got False)"),
        ('share = "0.5"', "share: Input should be a valid number (got '0.5')"),
        ("pair = [0.1, nan]", "pair.1: Input should be a finite number"),
        ("name = 5", "name: Input should be a valid string (got 5)"),
        ("name = 2024-05-01", "name: Input should be a valid string"),
        ('path = ""', "path: must not be empty"),
        ('path = " "', "path: must not be empty"),
        ('path = "a\\u0000b"', "path: must be a path without control characters"),
        ('path = "~nobody-of-this-name/x"', "path: ~nobody-of-this-name: no such user"),
        (f'path = "{"x" * 256}"', "path: must be a path of at most 4000 characters with names of at most 255"),
        (f'path = "{"é" * 128}"', "names of at most 255"),
        (f'path = "{"x/" * 2500}"', "path: must be a path of at most 4000 characters"),
        ('inner = "https://me:hunter2@host/v1"', "inner: Input should be a valid dictionary"),
        ('api_key_env = "sk-123456789"', "api_key_env: String should match pattern"),
        ('name = "a"\nname = "b"', "not valid TOML"),
        ("other = {a = 1}", "other: unknown key"),
        ("share = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("x" + ".x" * 5000 + " = 1", "nested too deeply"),
        ("entries = [" + "[1, 2, 3], " * 500 + "]", "entries.0: Input should be a valid dictionary"),
    ],
)
def test_what_is_no_value_of_the_field_is_refused_in_a_short_line(tmp_path, toml, expected):
    text = toml if "name = " in toml else f'name = "a"\n{toml}'
    with pytest.raises(ConfigError) as caught:
        load_recipe(Outer, [write(tmp_path / "r.toml", text)])
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message and len(message) < 500
    assert "hunter2" not in message and "sk-1234" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('name = "ü"'.encode("latin-1"), "not UTF-8"),
        ('name = "a"'.encode("utf-16"), "not UTF-8"),
        (b'name = "a\0b"', "not valid TOML"),
        (b"# " + b"x" * 9 * 1024**2, "has more than 8 MiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, expected):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(Outer, [tmp_path / "r.toml"])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_and_a_home_folder_are_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "r.toml").write_bytes(b'\xef\xbb\xbfname = "a"\r\npath = "~/runs"\r\npair = [1, 2]\r\n')
    recipe = load_recipe(Outer, [tmp_path / "r.toml"])
    assert (recipe.path, recipe.pair) == ("/home/me/runs", (1.0, 2.0))
    # What was resolved once is read again as it is: manifests and workers do so.
    assert Outer.model_validate(json.loads(json.dumps(resolved(recipe)))) == recipe


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["name=5"], {"name": "5"}),
        (["name=2024-05-01"], {"name": "2024-05-01"}),
        (["name=true"], {"name": "true"}),
        (['name="quoted"'], {"name": "quoted"}),
        (["name=a=b"], {"name": "a=b"}),
        (["name = spaced "], {"name": "spaced"}),
        (["name=x\ninner.size = 9"], {"name": "x\ninner.size = 9"}),
        (["entries.1.size=7"], {"entries": [Inner(size=2), Inner(size=7)]}),
        (["inner={size=4}", "inner.size=5"], {"inner": Inner(size=5)}),
        (["share=1"], {"share": 1.0}),
    ],
)
def test_overrides_mean_what_they_look_like(tmp_path, overrides, expected):
    recipe = write(tmp_path / "r.toml", 'name = "a"\nentries = [{size = 2}, {size = 3}]\n')
    loaded = load_recipe(Outer, [recipe], overrides)
    assert {name: getattr(loaded, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("=1", "expected the form section.field=value"),
        ("inner..size=1", "expected the form section.field=value"),
        ("inner.=1", "expected the form section.field=value"),
        ("entries.2.size=1", "--set entries.2.size: expected the number of an entry, 0 to 1, not '2'"),
        ("entries.first.size=1", "expected the number of an entry"),
        ("inner.size=true", "inner.size: Input should be a valid integer"),
        ("name.x=1", "name: Input should be a valid string"),
        ("sk-abcdefghijkl", "something that looks like a secret"),
        ("x." * 4000 + "x=1", "nested too deeply"),
    ],
)
def test_an_odd_override_is_one_short_line(tmp_path, override, expected):
    recipe = write(tmp_path / "r.toml", 'name = "a"\nentries = [{size = 2}, {size = 3}]\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(Outer, [recipe], [override])
    assert expected in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


class Checked(Recipe):
    names: list[str]
    """Names."""
    main: str
    """One of them."""

    @model_validator(mode="after")
    def _is_known(self):
        if self.main not in self.names:
            raise ValueError(f"main: {self.main!r} is none of {', '.join(self.names)}")
        return self


def test_a_check_of_the_whole_recipe_does_not_print_the_recipe(tmp_path):
    recipe = write(tmp_path / "r.toml", 'names = ["a", "b"]\nmain = "c"\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(Checked, [recipe])
    assert str(caught.value) == f"{recipe}: recipe: main: 'c' is none of a, b"


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["~", "~/x", "~x", "", "sk-abcdefghij", 2**63, 10**30, "\ud800"])
)
keys = st.sampled_from([*Outer.model_fields, "size", "0", "", "x.y"])
tables = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=10
)


@settings(max_examples=200, deadline=None)
@given(values=st.dictionaries(keys, tables, max_size=6), named=st.booleans())
def test_hostile_values_give_a_recipe_that_says_the_same_or_one_line(values, named):
    if named:
        values = {"name": "a", **values}
    try:
        recipe = validate(Outer, values, "r.toml")
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return
    stored = json.loads(json.dumps(resolved(recipe), allow_nan=False))
    assert Outer.model_validate(stored) == recipe
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            assert stored[name] == value and isinstance(stored[name], bool) == isinstance(value, bool)
            assert math.isfinite(value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    content=st.binary(max_size=40)
    | st.text(st.sampled_from('abname=".[]{}#\n\r\\u0 1e9-:T\0é'), max_size=60).map(str.encode)
)
def test_hostile_files_give_a_recipe_or_one_line(tmp_path, content):
    (tmp_path / "r.toml").write_bytes(content)
    try:
        load_recipe(Outer, [tmp_path / "r.toml"], ["name=a"])
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_missing_recipe_is_named():
    with pytest.raises(ConfigError, match=r"recipe nowhere.toml: no such file"):
        load_recipe(Outer, ["nowhere.toml"])


SCRIPT = """
import errno, os, signal, sys, time
from janus_ray.config import Recipe
from janus_ray.errors import DataError
from janus_ray.job import run_job

class R(Recipe):
    n: int = 0
    'A number.'

def wait():
    print('begun', end='')
    print(' and waiting', file=sys.stderr, flush=True)
    time.sleep(60)

def run(recipe, if_exists):
    if recipe.n == 1: raise DataError('row 7: broken')
    if recipe.n == 2: raise RuntimeError('ours')
    if recipe.n == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/big/disk/part-0')
    if recipe.n == 4: raise DataError('no file ' + os.fsdecode(b'\\xff.jsonl'))
    if recipe.n == 5: wait()
    if recipe.n == 7: print('x' * 1_000_000)
    print('ran', recipe.n, if_exists)

run_job(R, run, 'doc')
"""


def command(tmp_path, *arguments):
    script, recipe = write(tmp_path / "job.py", SCRIPT), write(tmp_path / "r.toml", "n = 5\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    return {"args": [sys.executable, str(script), str(recipe), *arguments], "env": environment, "text": True}


def job(tmp_path, *arguments, **more):
    return subprocess.run(
        **command(tmp_path, *arguments), **{"capture_output": True, "timeout": 60, "check": False, **more}
    )


def test_exit_codes_of_a_job(tmp_path):
    assert job(tmp_path, "--set", "n=0").stdout == "ran 0 fail\n"
    assert json.loads(job(tmp_path, "--dry-run", "--set", "n=9").stdout) == {"n": 9}
    failed = job(tmp_path, "--set", "n=1")
    assert (failed.returncode, failed.stderr) == (2, "error: row 7: broken\n")
    bug = job(tmp_path, "--set", "n=2")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    full = job(tmp_path, "--set", "n=3")
    assert full.returncode == 2
    assert full.stderr.startswith("error: /big/disk/part-0: No space left on device; make room")
    assert job(tmp_path, "--set", "n=4").stderr == "error: no file \\udcff.jsonl\n"


@pytest.mark.parametrize(
    ("number", "times", "code", "word"),
    [
        (signal.SIGTERM, 1, 143, "terminated"),
        (signal.SIGINT, 1, 130, "interrupted"),
        (signal.SIGTERM, 2, 143, "terminated"),
        (signal.SIGINT, 2, 130, "interrupted"),
    ],
)
def test_a_signal_is_one_line_and_its_exit_code(tmp_path, number, times, code, word):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(**command(tmp_path), **pipes) as process:
        assert process.stderr.readline() == " and waiting\n"
        for _ in range(times):
            process.send_signal(number)
        assert process.wait(30) == code
        assert process.stderr.read() == f"{word}; run again with --if-exists resume to continue\n"
        # What was said before is not lost with the process.
        assert process.stdout.read() == "begun"


def test_a_job_that_a_shell_put_in_the_background_ignores_ctrl_c(tmp_path):
    with subprocess.Popen(
        **command(tmp_path), stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    ) as process:
        assert process.stderr.readline() == " and waiting\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--dry-run"], ""), (["--set", "n=7"], "nobody reads standard output any more")]
)
def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path, arguments, said):
    ours, theirs = os.pipe()
    os.close(ours)
    result = job(tmp_path, *arguments, capture_output=False, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert result.returncode == 141
    assert (said in result.stderr) if said else result.stderr == ""
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
