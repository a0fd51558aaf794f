from __future__ import annotations

import threading

import pytest
import s3fs

from janus_ray.errors import DataError
from janus_ray.store.files import (
    create,
    delete_files,
    files_below,
    read_bytes,
    read_json,
    what_is_at,
    write_json,
    write_jsonl,
    written_beside,
)
from janus_ray.store.location import location
from janus_ray.store.log import AppendLog, flush_all, read_line, read_logs
from tests.s3 import BUCKET


@pytest.fixture
def folder(s3, monkeypatch):
    # A fault is seen after two attempts as well as after five.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    return location(s3.folder())


def test_files_are_written_found_read_and_deleted(folder):
    assert what_is_at(folder) is None and files_below(folder) == []
    write_json(folder / "a.json", {"x": float("nan")})
    assert read_json(folder / "a.json") == {"x": None}
    assert read_bytes(folder / "a.json", 2, 5) == b'  "'
    write_jsonl(folder / "deep" / "rows*[1].jsonl", [{"a": "ü"}])
    write_jsonl(folder / "deep" / "rows*[1].jsonl2", [{"a": "half \ud83d"}])
    assert what_is_at(folder) == what_is_at(folder / "deep") == what_is_at(f"s3://{BUCKET}") == "folder"
    assert what_is_at(folder / "a.json") == "file"
    # A folder's own marker, as consoles make it, is no file.
    folder.fs.pipe_file(folder.path + "/deep/", b"")
    found = files_below(folder)
    assert [(each.name, each.size_bytes) for each in found] == [
        ("a.json", 16),
        ("deep/rows*[1].jsonl", 12),
        ("deep/rows*[1].jsonl2", 18),
    ]
    assert [each.name for each in files_below(folder, deep=False)] == ["a.json"]
    delete_files(found[:2])
    assert [each.name for each in files_below(folder)] == ["deep/rows*[1].jsonl2"]
    assert read_bytes(folder / "deep" / "rows*[1].jsonl2").decode() == '{"a": "half \ufffd"}\n'


def test_of_several_that_create_a_file_one_does(folder):
    made = []
    threads = [
        threading.Thread(target=lambda n=n: made.append((create(folder / "x", str(n).encode()), n))) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [n for won, n in made if won]
    assert read_bytes(folder / "x") == str(winner).encode()


@pytest.mark.parametrize("act", ["write", "read", "look", "list", "create"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("slow down", "the storage asks for fewer requests, also after retries"),
        ("refuse", "the storage refuses these credentials"),
        ("cut", "onnect"),
    ],
)
def test_a_fault_of_the_storage_is_one_line(folder, s3, kind, reason, act):
    acts = {
        "write": lambda: write_json(folder / "x", 1),
        "read": lambda: read_json(folder / "x"),
        "look": lambda: what_is_at(folder / "x"),
        "list": lambda: files_below(folder),
        "create": lambda: create(folder / "x", b"1"),
    }
    s3.fail(kind)
    with pytest.raises(DataError) as caught:
        acts[act]()
    assert reason in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    s3.heal()
    assert what_is_at(folder / "x") is None


@pytest.mark.parametrize("kind", ["slow down", "cut"])
def test_a_fault_that_passes_is_not_seen(folder, s3, kind):
    s3.fail(kind, times=1)
    write_json(folder / "x", 1)
    s3.fail(kind, times=1)
    assert read_json(folder / "x") == 1


def test_a_write_that_is_cut_leaves_the_old_file(folder, s3):
    write_json(folder / "x", "old")
    s3.fail("cut", "PUT")
    with pytest.raises(DataError, match="cannot be written"):
        write_json(folder / "x", "new" * 100_000)
    with pytest.raises(DataError, match="cannot be written"), written_beside(folder / "x") as temporary:
        temporary.write_bytes(b"new" * 100_000)
    assert not temporary.exists()
    s3.heal()
    assert read_json(folder / "x") == "old"
    with pytest.raises(KeyError), written_beside(folder / "x") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert read_json(folder / "x") == "old"


def test_what_is_not_there_is_said(folder):
    with pytest.raises(DataError, match=r"x: no such file$"):
        read_json(folder / "x")
    for act in (what_is_at, read_json, files_below, lambda path: write_json(path, 1), lambda path: create(path, b"")):
        with pytest.raises(DataError, match=r"s3://nobodys-bucket/x: .*no such bucket"):
            act("s3://nobodys-bucket/x")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "the storage refuses these credentials (InvalidAccessKeyId"),
        ({"AWS_ACCESS_KEY_ID": ""}, "no credentials"),
        ({"AWS_PROFILE": "nobody"}, "no credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to the endpoint URL"),
    ],
)
def test_what_is_wrong_with_the_environment_is_one_line(s3, environment, reason, monkeypatch):
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(DataError) as caught:
        write_json(f"s3://{BUCKET}/x", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_log_is_a_file_or_segments_and_nothing_is_lost(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("janus_ray.store.log._SEGMENT_BYTES", 30)
    for where in (folder, tmp_path):
        for run in range(2):
            log = AppendLog(where, "a")
            for number in range(3):
                log.append(b"%d line %d\n" % (run, number) * 1)
                log.flush()
            log.close()
        assert [line.content for line in read_logs(where)] == [b"%d line %d" % (r, n) for r in (0, 1) for n in range(3)]
        for line in read_logs(where):
            assert read_line(line.file, line.offset, len(line.content)) == line.content
    assert len(files_below(tmp_path)) == 1 and len(files_below(folder)) == 2
    assert list(read_logs(folder / "nothing")) == list(read_logs(tmp_path / "nothing")) == []


def test_a_torn_last_line_takes_no_other_with_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"one\ntw")
    log = AppendLog(tmp_path, "a")
    log.append(b"three\n")
    log.close()
    assert [line.content for line in read_logs(tmp_path)] == [b"one", b"tw", b"three"]


def test_what_a_log_could_not_write_is_said_and_written_later(folder, s3):
    log = AppendLog(folder, "a")
    s3.fail("slow down", "PUT")
    log.append(b"one\n")
    with pytest.raises(DataError, match="cannot be written: the storage asks for fewer requests"):
        log.flush()
    with pytest.raises(DataError, match="cannot be written"):
        log.append(b"two\n")
    s3.heal()
    log.close()
    assert [line.content for line in read_logs(folder)] == [b"one", b"two"]


def test_a_storage_that_says_nothing_is_one_line_in_the_end(folder, s3, monkeypatch):
    monkeypatch.setattr("janus_ray.store.files._LONGEST_S", 0.1)
    s3.fail("hang")
    for write in (lambda: write_json(folder / "x", 1), lambda: create(folder / "x", b"1")):
        with pytest.raises(DataError, match="x: cannot be written: no answer in time"):
            write()
    with pytest.raises(DataError, match="no answer in time"), written_beside(folder / "x") as temporary:
        temporary.write_bytes(b"1")
    s3.heal()
    assert what_is_at(folder / "x") is None


def test_what_is_appended_is_written_without_being_asked(folder, s3):
    log = AppendLog(folder, "a")
    log.append(b"one\n")
    while not (written := [line.content for line in read_logs(folder)]):
        pass
    assert written == [b"one"]
    log.close()
    flush_all()
