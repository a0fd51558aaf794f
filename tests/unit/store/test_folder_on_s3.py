from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import s3fs

from janus_ray.config import PathText, RayConfig, Recipe
from janus_ray.errors import ConfigError, DataError
from janus_ray.store import lease as leases
from janus_ray.store.fetch import upload_folder
from janus_ray.store.files import files_below, read_json, what_is_at, write_bytes, write_json, write_text
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.folder import Ref, RunFolder, read_manifest
from janus_ray.store.hub import model_folder
from janus_ray.store.lease import Lease, release_all, take_lease
from janus_ray.store.location import location
from janus_ray.store.log import read_logs

REPOSITORY = Path(__file__).parents[3]


class Plan(Recipe):
    n: int = 1
    """A number."""
    data: PathText = "elsewhere"
    """Where from."""


@pytest.fixture
def remote(s3, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    yield location(s3.folder())
    release_all()


@pytest.fixture(params=["s3", "no flock"])
def out(request, tmp_path, monkeypatch):
    """A folder whose owner is named by a file: on S3, and where a file system has no locks."""
    if request.param == "s3":
        yield request.getfixturevalue("remote") / "out"
        return

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(leases, "fcntl", type("no locks", (), {**vars(fcntl), "flock": staticmethod(no_locks)}))
    yield location(tmp_path / "out")
    release_all()


def test_a_folder_lives_on_an_object_storage_as_on_a_file_system(out):
    folder = RunFolder(out, Plan(), "fail")
    folder.begin({"text": Ref("a", "1")})
    write_text(out / "deep" / "half.txt", "x")
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(out)
    with pytest.raises(ConfigError, match="exists and is unfinished"):
        RunFolder(out, Plan(), "fail")
    with pytest.raises(ConfigError, match=r"another recipe \(differs in: n\)"):
        RunFolder(out, Plan(n=2), "resume")
    with pytest.raises(ConfigError, match=r"other inputs \(changed since: text b\)"):
        RunFolder(out, Plan(), "resume").begin({"text": Ref("b", "2")})
    folder.finish(counts={"rows": 3})
    assert read_manifest(str(out))["inputs"] == {"text": {"uri": "a", "revision": "1"}}
    again = RunFolder(out, Plan(), "resume")
    assert again.finished
    again.begin({"text": Ref("elsewhere", "1")})
    assert not again.finished and what_is_at(out / "deep" / "half.txt")
    replaced = RunFolder(out, Plan(n=2), "overwrite")
    replaced.begin({})
    assert [each.name for each in files_below(out) if not each.name.startswith(".")] == ["inputs.json", "recipe.json"]


@pytest.mark.parametrize("if_exists", ["fail", "resume", "overwrite"])
def test_what_is_not_ours_is_never_touched(remote, if_exists):
    write_text(remote / "thesis" / "text.tex", "years of work")
    write_json(remote / "thesis" / "recipe.json", {"flour_g": 500})
    write_text(remote / "thesis-2.tex", "more")
    with pytest.raises(ConfigError, match="was not made by this project"):
        RunFolder(remote / "thesis", Plan(), if_exists)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(remote / "thesis-2.tex", Plan(), if_exists)
    assert len(files_below(remote)) == 3


def test_an_overwrite_deletes_neither_what_is_beside_it_nor_what_is_to_be_read(remote):
    RunFolder(remote / "out", Plan(), "fail").begin({})
    write_text(remote / "out" / "model" / "weights", "paid for")
    write_text(remote / "out-2" / "weights", "paid for")
    with pytest.raises(ConfigError, match="would delete data = s3://"):
        RunFolder(remote / "out", Plan(data=str(remote / "out" / "model")), "overwrite")
    RunFolder(remote / "out", Plan(data=str(remote / "out-2")), "overwrite").begin({})
    assert what_is_at(remote / "out" / "model") is None and what_is_at(remote / "out-2" / "weights")


@pytest.mark.parametrize(
    ("fault", "method", "reason"), [("refuse", "", "refuses these credentials"), ("cut", "PUT", "cannot be written")]
)
def test_a_storage_that_fails_is_one_line_and_never_a_finished_folder(remote, s3, fault, method, reason):
    folder = RunFolder(remote / "out", Plan(), "fail")
    folder.begin({})
    s3.fail(fault, method)
    with pytest.raises(DataError, match=reason):
        folder.finish(counts={})
    with pytest.raises(DataError, match=reason) if fault == "refuse" else pytest.raises(ConfigError, match="exists"):
        RunFolder(remote / "out", Plan(), "fail")
    s3.heal()
    assert not RunFolder(remote / "out", Plan(), "resume").finished


WRITER = """
import sys
from janus_ray.config import RayConfig
from janus_ray.job import end_on_signals
from janus_ray.store import log as module
from janus_ray.store.folder import RunFolder

# Nothing is written unless it is asked for.
module._HELD_BACK_S = 1e6
end_on_signals("")
RunFolder(sys.argv[1], RayConfig(), "fail").begin({})
log = module.AppendLog(sys.argv[1] + "/ledger", "a")
log.append(b"flushed\\n")
log.flush()
log.append(b"held back\\n")
print("begun", flush=True)
sys.stdin.readline()
raise KeyError("an end that nobody planned")
"""


def writer(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=REPOSITORY, **pipes)


def test_one_process_writes_and_another_follows_when_it_ends_however_it_ends(remote, monkeypatch):
    """And what its log held back is there in the end, unless it was killed with -9."""
    folders = {ending: remote / ending for ending in ("killed", "told to end", "failed")}
    processes = {ending: writer(folder) for ending, folder in folders.items()}
    for ending, process in processes.items():
        assert process.stdout.readline() == "begun\n"
        taken = rf"another run is writing there at the moment \(process {process.pid} on "
        with pytest.raises(ConfigError, match=taken):
            RunFolder(folders[ending], RayConfig(), "resume").begin({})
    processes["killed"].kill()
    processes["told to end"].terminate()
    processes["failed"].stdin.close()
    for process in processes.values():
        process.wait(120)
        process.stdout.close()
    here = leases._this_process()
    monkeypatch.setattr(leases, "_this_process", lambda: {**here, "host": "elsewhere"})
    for ending in ("told to end", "failed"):
        # Another machine cannot look at a process; it sees what was said at the end.
        RunFolder(folders[ending], RayConfig(), "resume").begin({})
        assert [line.content for line in read_logs(folders[ending] / "ledger")] == [b"flushed", b"held back"]
    with pytest.raises(ConfigError, match="another run is writing there at the moment"):
        RunFolder(folders["killed"], RayConfig(), "resume").begin({})
    monkeypatch.undo()
    RunFolder(folders["killed"], RayConfig(), "resume").begin({})
    assert [line.content for line in read_logs(folders["killed"] / "ledger")] == [b"flushed"]


def another_machines(folder, number=1):
    """The file of an owner whose process nobody here can look at."""
    owner = {"token": "x", "host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "started": "1"}
    write_bytes(folder / f".owner-{number:06d}.json", json.dumps(owner).encode())


def test_of_several_that_take_over_a_stale_folder_exactly_one_does(out, monkeypatch):
    if isinstance(out, Path):
        out.mkdir()
    another_machines(out)
    monkeypatch.setattr(leases, "_age_s", lambda owner, folder: 1e9 if owner.content.get("host") == "elsewhere" else 0)
    outcomes = []
    # What this process holds is the same for all its threads, so they compete below that.
    barrier = threading.Barrier(5)

    def take():
        barrier.wait()
        try:
            outcomes.append(Lease.taken(out))
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [each for each in outcomes if isinstance(each, Lease)]
    assert all("another run" in each for each in outcomes if isinstance(each, str))
    winner.check()
    winner.release()


def test_a_fresh_sign_of_life_is_measured_by_the_storage(out, monkeypatch):
    if isinstance(out, Path):
        out.mkdir()
    another_machines(out)
    with pytest.raises(ConfigError, match="another run is writing there"):
        take_lease(out)
    monkeypatch.setattr(leases, "_STALE_S", -2.0)
    take_lease(out).check()


def test_who_lost_the_folder_notices_before_its_manifest(out, monkeypatch):
    folder = RunFolder(out, Plan(), "fail")
    folder.begin({})
    # As after a pause of this machine in which another one saw no sign of life.
    another_machines(out, number=2)
    with pytest.raises(DataError, match=r"process 1 on elsewhere has taken it over, because this run gave no sign of"):
        folder.finish(counts={})
    assert what_is_at(out / "manifest.json") is None
    # And it does not come back: not even where that one has finished by now.
    folder._lease.release()
    with pytest.raises(DataError, match="has taken it over"):
        folder.check_held()
    assert read_json(out / ".owner-000002.json")["host"] == "elsewhere"


def test_a_sign_of_life_is_given_until_the_folder_is_lost(remote, s3, monkeypatch):
    monkeypatch.setattr(leases, "_BEAT_S", 0.01)
    lease = Lease.taken(remote)
    while not any(line.startswith("PUT") and ".owner-000001" in line for line in s3.requests()[5:]):
        pass
    another_machines(remote, number=7)
    lease._thread.join()
    with pytest.raises(DataError, match="has taken it over"):
        lease.check()


def test_a_fingerprint_needs_no_download_and_sees_names_and_contents(remote, s3):
    write_text(remote / "a", "1")
    before, single = fingerprint(remote), fingerprint(str(remote / "a"))
    assert before.startswith("s3:") and single.startswith("s3:") and before != single
    write_json(remote / "manifest.json", {})
    write_text(remote / ".cache" / "x", "x")
    assert fingerprint(remote) == before
    write_text(remote / "b", "1")
    assert fingerprint(remote) != before
    write_text(remote / "a", "2")
    assert fingerprint(remote / "a") != single
    s3.heal()
    fingerprint(remote)
    fingerprint(remote / "a")
    assert not [line for line in s3.requests() if line.startswith("GET") and "list-type" not in line]
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        fingerprint(remote / "nothing")
    s3.fail("refuse")
    with pytest.raises(DataError, match="refuses these credentials"):
        fingerprint(remote)


def test_a_model_is_fetched_once_for_each_content(remote, s3, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JANUS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "model" / "deep").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "deep/other.bin", "index.json"):
        (tmp_path / "model" / name).write_text(f"old {name}")
    upload_folder(tmp_path / "model", remote / "model", last=["index.json"])
    puts = [line.split("/")[-1] for line in s3.requests() if line.startswith("PUT")]
    assert puts[-1].startswith("index.json") and len(puts) == 4
    first = model_folder(str(remote / "model"))
    assert isinstance(first, Path) and first.is_relative_to(tmp_path / "cache")
    names = sorted(each.name for each in first.iterdir())
    assert names == ["config.json", "index.json", "model.safetensors"]
    assert capsys.readouterr().out.startswith(f"fetching {remote / 'model'} (3 files, ")
    assert model_folder(str(remote / "model")) == first and capsys.readouterr().out == ""
    write_text(remote / "model" / "config.json", "new")
    s3.fail("cut", "GET", "safetensors")
    with pytest.raises(DataError):
        model_folder(str(remote / "model"))
    s3.heal()
    second = model_folder(str(remote / "model"))
    assert (second / "config.json").read_text() == "new" and (first / "config.json").read_text() == "old config.json"
    assert sorted(each.name for each in second.parent.iterdir() if not each.name.startswith(".")) == sorted(
        [first.name, second.name]
    )


def test_a_listing_that_missed_another_owner_makes_nobody_one_as_well(out, monkeypatch):
    """A listing is no moment: it may miss the new number, made behind its back, and the old one, gone since."""
    if isinstance(out, Path):
        out.mkdir()
    another_machines(out, number=7)
    true, listings = leases._owners, [[]]
    monkeypatch.setattr(leases, "_owners", lambda folder: listings.pop() if listings else true(folder))
    with pytest.raises(ConfigError, match="another run has begun to write there just now"):
        Lease.taken(out)
