"""What is sent to a cluster with a job."""

from __future__ import annotations

import io
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import ConfigError
from janus_ray.submit.package import _is_left_out, files_to_send, packed

REPOSITORY = Path(__file__).parents[3]


def fill(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("checkout", [True, False])
def test_what_git_or_rayignore_leaves_out_stays_here(tmp_path, checkout):
    wanted = ["jobs/a.py", "new.py", "ü/ß.txt", "deep/er/x.toml"]
    fill(tmp_path, *wanted, "runs/out/x.bin", ".venv/lib/a.so", "sub/__pycache__/a.pyc", "docs/a.md", ".env", "x.log")
    (tmp_path / ".gitignore").write_text("runs/\n# a comment\n*.log\n")
    (tmp_path / ".rayignore").write_text("docs\n.env\n\n")
    if checkout:
        git(tmp_path, "init")
        # Tracked, and still of no use on the cluster.
        git(tmp_path, "add", "jobs", "docs", ".gitignore")
    os.symlink("/nowhere", tmp_path / "broken")
    os.symlink(tmp_path, tmp_path / "circle")
    assert files_to_send(tmp_path) == sorted([*wanted, ".gitignore", ".rayignore"])


def test_a_file_that_is_tracked_and_gone_is_not_sent(tmp_path):
    fill(tmp_path, "a.py", "b.py")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    (tmp_path / "a.py").unlink()
    assert files_to_send(tmp_path) == ["b.py"]


def test_our_own_checkout_is_small_and_holds_the_jobs():
    names = files_to_send(REPOSITORY)
    assert {"jobs/collect.py", "janus_ray/cluster.py", "jobs/recipes/miniature_collect.toml"} <= set(names)
    assert not [name for name in names if name.startswith((".git/", ".venv", "runs/", "tests/", "docs/"))]
    assert sum((REPOSITORY / name).stat().st_size for name in names) < 4 * 1024**2


def test_too_much_is_refused_with_the_folders_that_hold_most(tmp_path):
    fill(tmp_path, "data/images/a", "data/images/b", size=600_000)
    fill(tmp_path, "weights.bin", size=900_000)
    fill(tmp_path, "src/a.py")
    with pytest.raises(ConfigError) as refused:
        packed(tmp_path, files_to_send(tmp_path), {}, limit_mib=1)
    assert "has 2 MiB to send to the cluster, at most 1 are sent" in str(refused.value)
    assert "most of it: data/images (1 MiB), weights.bin (1 MiB), src (0 MiB); name in .rayignore" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_equal_files_are_an_equal_package_with_what_comes_along(tmp_path):
    fill(tmp_path, "b.py", "a/run.sh")
    (tmp_path / "a/run.sh").chmod(0o755)
    names = files_to_send(tmp_path)
    first = packed(tmp_path, names, {"sent/0-r.toml": b"x = 1"}, limit_mib=1)
    os.utime(tmp_path / "b.py", (0, 0))
    assert packed(tmp_path, names, {"sent/0-r.toml": b"x = 1"}, limit_mib=1) == first
    with zipfile.ZipFile(io.BytesIO(first)) as package:
        assert package.namelist() == ["a/run.sh", "b.py", "sent/0-r.toml"]
        assert package.read("sent/0-r.toml") == b"x = 1"
        assert [entry.external_attr >> 16 for entry in package.infolist()] == [0o755, 0o644, 0o644]


def test_an_ignore_file_that_takes_something_back_is_refused(tmp_path):
    fill(tmp_path, "a.py")
    (tmp_path / ".rayignore").write_text("data\n!data/small\n")
    with pytest.raises(ConfigError, match=r"\.rayignore: lines that start with ! are not understood"):
        files_to_send(tmp_path)


PARTS = st.lists(st.sampled_from(["a", "b.py", "*", "[x", "data", "ü", "a b"]), min_size=1, max_size=4).map("/".join)


@given(PARTS, st.lists(PARTS, max_size=3))
@settings(max_examples=60)
def test_a_pattern_leaves_out_what_it_names_and_all_below(name, patterns):
    left_out = _is_left_out(name, patterns)
    assert not left_out or _is_left_out(f"{name}/below", patterns)
    literal = [pattern for pattern in patterns if not set(pattern) & set("*[")]
    if any(f"{name}/".startswith(f"{pattern}/") for pattern in literal):
        assert left_out
    if not patterns:
        assert not left_out
