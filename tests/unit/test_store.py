from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from janus_ray.config import OPERATIONAL, PathText, RayConfig, Recipe
from janus_ray.data.recipe import Source
from janus_ray.errors import ConfigError, DataError
from janus_ray.store.files import write_json, write_jsonl
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.folder import UNKNOWN, Ref, RunFolder, read_manifest
from janus_ray.store.tables import read_jsonl, read_parquet, write_parquet

REPOSITORY = Path(__file__).parents[2]


class Plan(Recipe):
    n: int = 1
    """A number."""


def test_a_folder_is_finished_only_with_its_manifest(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("hello")
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    assert not folder.finished and not folder.path.exists()
    folder.begin({"text": Ref.of(source)})
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(folder.path)
    folder.finish(counts={"rows": 3}, template_sha256="abc")
    manifest = read_manifest(folder.path)
    assert manifest["recipe"] == {"n": 1}
    assert manifest["counts"] == {"rows": 3}
    assert manifest["template_sha256"] == "abc"
    # sha256 of "hello", known from elsewhere
    assert manifest["inputs"]["text"]["uri"] == str(source)
    assert manifest["inputs"]["text"]["revision"].startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")


def test_an_existing_folder_is_refused_resumed_or_replaced(tmp_path):
    path = tmp_path / "out"
    RunFolder(path, Plan(), "fail").begin({})
    (path / "half.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists and is unfinished"):
        RunFolder(path, Plan(), "fail")
    RunFolder(path, Plan(), "resume").begin({})
    assert (path / "half.txt").exists()
    with pytest.raises(ConfigError, match=r"another recipe \(differs in: n\)"):
        RunFolder(path, Plan(n=2), "resume")
    replacing = RunFolder(path, Plan(n=2), "overwrite")
    # Whatever may still refuse the job, nothing is lost before it begins.
    assert (path / "half.txt").exists()
    replacing.begin({})
    assert not (path / "half.txt").exists()


def test_a_finished_folder_counts_as_unfinished_once_work_on_it_begins(tmp_path):
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin({})
    folder.finish(counts={})
    with pytest.raises(ConfigError, match="exists and is finished"):
        RunFolder(tmp_path / "out", Plan(), "fail")
    again = RunFolder(tmp_path / "out", Plan(), "resume")
    assert again.finished
    assert not RunFolder(tmp_path / "out", Plan(), "overwrite").finished
    again.begin({})
    assert not again.finished


def test_only_one_run_writes_into_a_folder(tmp_path):
    code = (
        "import sys; from janus_ray.store.folder import RunFolder; from janus_ray.config import RayConfig; "
        f"RunFolder({str(tmp_path / 'out')!r}, RayConfig(), 'fail').begin({{}}); print('begun', flush=True); "
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True, **pipes) as other:
        assert other.stdout.readline() == "begun\n"
        for if_exists in ("resume", "overwrite"):
            with pytest.raises(ConfigError, match="another run is writing there"):
                RunFolder(tmp_path / "out", RayConfig(), if_exists).begin({})
        other.kill()
    RunFolder(tmp_path / "out", RayConfig(), "resume").begin({})


class Worker(Recipe):
    actors: int = Field(default=1, json_schema_extra=OPERATIONAL)
    """Processes."""
    model: str = "a"
    """The model."""


class Job(Recipe):
    worker: Worker = Worker()
    """Who works."""


def test_a_resume_may_change_how_the_work_is_done_but_not_what(tmp_path):
    RunFolder(tmp_path / "out", Job(), "fail").begin({})
    RunFolder(tmp_path / "out", Job(worker=Worker(actors=4)), "resume").begin({})
    with pytest.raises(ConfigError, match="differs in: worker"):
        RunFolder(tmp_path / "out", Job(worker=Worker(model="b")), "resume")


def test_what_was_begun_belongs_to_its_inputs_as_they_were(tmp_path):
    source, model = tmp_path / "in.txt", Ref("an endpoint", UNKNOWN)
    source.write_text("1")
    inputs = {"text": Ref.of(source), "model": model}
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin(inputs)
    for _ in range(2):
        again = RunFolder(tmp_path / "out", Plan(), "resume")
        assert again.recorded() == inputs
        # Where it lies is no part of what it is.
        again.check_inputs({"text": Ref("elsewhere", inputs["text"].revision), "model": model}, whole=True)
        again.check_inputs({"model": model})
        source.write_text("2")
        changed = rf"out was made from other inputs \(changed since: text {source}\); choose another"
        with pytest.raises(ConfigError, match=changed):
            again.check_inputs({"text": Ref.of(source)})
        with pytest.raises(ConfigError, match=changed):
            again.begin({"text": Ref.of(source), "model": model})
        with pytest.raises(ConfigError, match="changed since: text\\)"):
            again.begin({"model": model})
        with pytest.raises(ConfigError, match="changed since: model an endpoint"):
            again.begin({"text": inputs["text"], "model": Ref("an endpoint", "weights 2")})
        RunFolder(tmp_path / "out", Plan(), "overwrite").check_inputs({"text": Ref.of(source)})
        source.write_text("1")
        # A finished folder is no other.
        if not again.finished:
            folder.finish(counts={})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "out", Plan(), "fail").begin({})


@pytest.mark.parametrize("if_exists", ["fail", "resume", "overwrite"])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path, if_exists):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by this project"):
        RunFolder(tmp_path, Plan(), if_exists)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("if_exists", ["fail", "resume", "overwrite"])
def test_a_folder_with_nothing_but_our_lock_is_ours(tmp_path, if_exists):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / ".recipe.json.4242.tmp").write_text('{"n"')
    RunFolder(tmp_path / "out", Plan(), if_exists).begin({})
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == {"n": 1}


@pytest.mark.parametrize("content", ['{"flour_g": 500}', "[1]", "no json", '{"n": "one"}'])
@pytest.mark.parametrize("if_exists", ["fail", "resume", "overwrite"])
def test_another_programs_recipe_does_not_make_a_folder_ours(tmp_path, content, if_exists):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ConfigError, match="was not made by this project"):
        RunFolder(tmp_path, Plan(), if_exists)
    assert (tmp_path / "recipe.json").read_text() == content


def test_a_run_that_was_copied_resumes_where_it_lies_now(tmp_path):
    RunFolder(tmp_path / "old", Plan(), "fail").begin({})
    (tmp_path / "new").mkdir()
    # As `cp -r old/* new` copies: without what begins with a dot.
    (tmp_path / "new" / "recipe.json").write_bytes((tmp_path / "old" / "recipe.json").read_bytes())
    copied = RunFolder(tmp_path / "new", Plan(), "resume")
    assert copied.resumes
    copied.begin({})
    assert (tmp_path / "new" / ".lock").is_file()


def test_a_link_to_our_folder_is_that_folder_and_nothing_beside_it_is_touched(tmp_path):
    RunFolder(tmp_path / "real", Plan(), "fail").begin({})
    (tmp_path / "real" / "old.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("years of work")
    (tmp_path / "real" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("real")
    RunFolder(tmp_path / "link", Plan(), "resume").begin({})
    assert (tmp_path / "real" / "old.txt").exists()
    RunFolder(tmp_path / "link", Plan(n=2), "overwrite").begin({})
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == [".lock", "inputs.json", "recipe.json"]
    assert (tmp_path / "elsewhere" / "thesis.tex").read_text() == "years of work"


def test_a_link_to_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError, match="was not made by this project"):
        RunFolder(tmp_path / "link", Plan(), "overwrite")


def test_where_nothing_can_be_written_is_said_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="gone is a link to nowhere, which is not there"):
        RunFolder(tmp_path / "gone", Plan(), "fail")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; choose another"):
        RunFolder(tmp_path / "file", Plan(), "overwrite")
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        RunFolder(tmp_path / ("x" * 300), Plan(), "fail")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="deep/er cannot be written: Permission denied"):
        RunFolder(tmp_path / "deep" / "er", Plan(), "fail")


def test_an_overwrite_that_dies_leaves_a_folder_that_is_ours_and_unfinished(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin({})
    (folder.path / "data").mkdir()
    folder.finish(counts={})

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path / "out", Plan(), "overwrite").begin({})
    monkeypatch.undo()
    assert not RunFolder(tmp_path / "out", Plan(), "resume").finished
    RunFolder(tmp_path / "out", Plan(), "overwrite").begin({})
    assert not (folder.path / "data").exists()


class Reading(Recipe):
    output_dir: PathText
    """Where to."""
    data: PathText
    """Where from."""
    more: list[Source] = Field(default=[])
    """Where else from."""


@pytest.mark.parametrize("inner", [".", "model", "model/weights"])
@pytest.mark.parametrize("field", ["data", "more.0.path"])
def test_an_overwrite_never_deletes_what_is_to_be_read(tmp_path, inner, field):
    made = tmp_path / "out"
    earlier = RunFolder(made, Reading(output_dir=str(made), data="elsewhere"), "fail")
    earlier.begin({})
    (made / "model").mkdir()
    (made / "model" / "weights").write_text("paid for")
    (tmp_path / "link").symlink_to(made)
    source = str(tmp_path / "link" / inner)
    recipe = Reading(
        output_dir=str(made),
        data=source if field == "data" else "elsewhere",
        more=[] if field == "data" else [Source(path=source)],
    )
    with pytest.raises(ConfigError, match=rf"would delete {field} = "):
        RunFolder(made, recipe, "overwrite")
    assert (made / "model" / "weights").read_text() == "paid for"
    beside = Reading(output_dir=str(made), data=str(tmp_path))
    RunFolder(made, beside, "overwrite").begin({})
    assert not (made / "model").exists()


def test_a_manifest_is_strict_json_and_any_text_can_be_written(tmp_path):
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin({})
    folder.finish(counts={"loss": float("nan"), "means": [1.0, float("-inf")]}, said="half \ud83d")
    text = (folder.path / "manifest.json").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(constant)

    manifest = json.loads(text, parse_constant=refuse)
    assert manifest["counts"] == {"loss": None, "means": [1.0, None]}
    assert manifest["said"] == "half \ufffd"


@pytest.mark.parametrize("content", ["[]", "{}", '{"inputs": 3}', '{"inputs": {"text": "x"}}'])
def test_a_record_that_says_nothing_about_inputs_is_never_taken_for_unchanged(tmp_path, content):
    (tmp_path / "in.txt").write_text("x")
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin({"text": Ref.of(tmp_path / "in.txt")})
    (folder.path / "inputs.json").write_text(content)
    with pytest.raises(ConfigError, match="was made from other inputs"):
        RunFolder(tmp_path / "out", Plan(), "resume").begin({"text": Ref.of(tmp_path / "in.txt")})


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def full(self, text, **_):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"x\.json: cannot be written: No space left on device"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    monkeypatch.setattr(pq, "write_table", lambda table, path, **_: full(Path(path), ""))
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        write_parquet(tmp_path / "x.parquet", pa.table({"a": [1]}))


def test_the_ledger_and_hidden_files_of_a_collection_are_not_its_content(tmp_path):
    folder = RunFolder(tmp_path / "out", Plan(), "fail")
    folder.begin({})
    write_parquet(folder.path / "part-0.parquet", pa.table({"a": [1]}))
    before = fingerprint(folder.path)
    (folder.path / "ledger").mkdir()
    (folder.path / "ledger" / "1.jsonl").write_text("{}")
    (folder.path / ".cache").mkdir()
    (folder.path / ".cache" / "x").write_text("x")
    assert fingerprint(folder.path) == before
    # Anybody else's "ledger" is content.
    (tmp_path / "other" / "ledger").mkdir(parents=True)
    empty = fingerprint(tmp_path / "other")
    (tmp_path / "other" / "ledger" / "1.jsonl").write_text("{}")
    assert fingerprint(tmp_path / "other") != empty


def test_shards_of_different_text_types_are_one_table_and_others_one_line(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.table({"t": pa.array(["x"], pa.string())}))
    write_parquet(tmp_path / "b.parquet", pa.table({"t": pa.array(["y"], pa.large_string())}))
    assert read_parquet(tmp_path).to_pylist() == [{"t": "x"}, {"t": "y"}]
    write_parquet(tmp_path / "c.parquet", pa.table({"t": [1]}))
    with pytest.raises(DataError, match="its files do not fit together") as caught:
        read_parquet(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_of_a_folder_sees_names_and_contents_but_not_the_manifest(tmp_path):
    (tmp_path / "a").write_text("1")
    before = fingerprint(tmp_path)
    write_json(tmp_path / "manifest.json", {})
    assert fingerprint(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = fingerprint(tmp_path)
    assert renamed != before
    (tmp_path / "b").write_text("2")
    assert fingerprint(tmp_path) != renamed


def test_jsonl_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "ü"}, {"a": None}])
    assert read_jsonl(path) == [{"a": "ü"}, {"a": None}]
    path.write_text('{"a": 1}\n\n{broken\n')
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: expected a JSON object, found list"):
        read_jsonl(path)
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_parquet_errors_name_the_column_and_those_present(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, pa.table({"x": [1], "y": [2]}))
    assert read_parquet(tmp_path, ["y"]).to_pylist() == [{"y": 2}]
    with pytest.raises(DataError, match="no column 'z'; it has: x, y"):
        read_parquet(path, ["z"])
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_parquet(path)
    with pytest.raises(DataError, match="holds no"):
        read_parquet((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_nothing_half_written_stays_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "x.json", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
