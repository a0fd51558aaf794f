"""Models and datasets of the hub: fetched, found in the cache, or refused in one line."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from janus_ray import progress
from janus_ray.errors import CheckpointError, DataError
from janus_ray.store.fingerprint import fingerprint
from janus_ray.store.hub import dataset_files, model_folder
from janus_ray.store.tables import read_rows
from tests.hub import Repository, reached

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"",
}


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def dataset(files: dict[str, bytes], name: str = "some-org/Data") -> Repository:
    return Repository(name, files, kind="dataset")


def offline(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_published_model_is_fetched_once_and_found_offline(tmp_path, monkeypatch):
    repository = Repository("some-org/janus-7b", dict(MODEL))
    with reached(monkeypatch, tmp_path, repository) as hub:
        folder = model_folder("some-org/janus-7b")
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert fingerprint("some-org/janus-7b") == fingerprint(folder) == f"hub:{repository.commit}"
        hub.requests.clear()
        offline(monkeypatch)
        assert model_folder("some-org/janus-7b") == folder
        assert model_folder(f"some-org/janus-7b@{repository.commit}") == folder
        assert hub.requests == []


def test_a_download_says_how_much_has_come_where_no_terminal_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    large = {**MODEL, "model.safetensors": bytes(3_000_000), "generation_config.json": bytes(1_000_000)}
    with reached(monkeypatch, tmp_path, Repository("some-org/janus-7b", large)):
        model_folder("some-org/janus-7b")
        shown, bars = capsys.readouterr()
        assert shown.splitlines()[-1].startswith("hub: MB of some-org/janus-7b 4/4 (100 %)") and not bars
        # What is there is not fetched again.
        model_folder("some-org/janus-7b")
        assert "MB" not in capsys.readouterr().out


def test_another_commit_is_another_fingerprint(tmp_path, monkeypatch):
    repository = Repository("some-org/janus-7b", dict(MODEL))
    with reached(monkeypatch, tmp_path, repository):
        first = model_folder("some-org/janus-7b")
        before = fingerprint("some-org/janus-7b")
        old = repository.commit
        repository.files["model.safetensors"] = b"better"
        second = model_folder("some-org/janus-7b")
        assert (first / "model.safetensors").read_bytes() == b"weights"
        assert (second / "model.safetensors").read_bytes() == b"better"
        assert fingerprint("some-org/janus-7b") == f"hub:{repository.commit}" != before
        assert fingerprint(f"some-org/janus-7b@{old}") == before


def test_the_hub_is_asked_for_the_commit_of_what_was_never_fetched(tmp_path, monkeypatch):
    repository = Repository("some-org/rows", {"train.jsonl": b"{}"}, kind="dataset")
    with reached(monkeypatch, tmp_path, repository) as hub:
        assert fingerprint("some-org/rows") == f"hub:{repository.commit}"
        assert not any("resolve" in path for path in hub.requests)
        with pytest.raises(DataError, match="dataset some-org/none: no such folder here, and no such dataset on"):
            fingerprint("some-org/none")
    offline(monkeypatch)
    with pytest.raises(DataError, match=r"some-org/none: neither here nor in the cache .* HF_HUB_OFFLINE is set"):
        fingerprint("some-org/none")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        fingerprint("./nowhere")


def test_weights_of_the_older_kind_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    files = {"config.json": b"{}", "pytorch_model.bin": b"weights", "training_args.bin": b"code"}
    with reached(monkeypatch, tmp_path, Repository("some-org/old", files)):
        assert sorted(file.name for file in model_folder("some-org/old").iterdir()) == [
            "config.json",
            "pytorch_model.bin",
        ]


@pytest.mark.parametrize(
    ("reference", "changes", "expected"),
    [
        ("some-org/nothing", {}, "model some-org/nothing: no such folder here, and no such model on http://127.0.0.1:"),
        ("some-org/m@v9", {}, "model some-org/m@v9: http://127.0.0.1:"),
        ("some-org/m", {"gated": True}, "its owner gives access on request: ask on its page, then set HF_TOKEN"),
        ("some-org/m", {"private": True}, "(a private one needs HF_TOKEN)"),
        ("some-org/m", {"status": 401}, "answers HTTP 401"),
        ("some-org/m", {"status": 418}, "answers HTTP 418"),
        ("some-org/m", {"status": 500}, "answers HTTP 500"),
        ("./nowhere", {}, "model ./nowhere: no such folder, and not the id of a published model (org/name)"),
        ("https://huggingface.co/some-org/m", {}, "what lies on the hub is named org/name"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, reference, changes, expected):
    with (
        reached(monkeypatch, tmp_path, Repository("some-org/m", dict(MODEL), **changes)),
        pytest.raises(CheckpointError) as caught,
    ):
        model_folder(reference)
    assert expected in one_line(caught)


def test_a_token_opens_what_is_gated_and_is_never_shown(tmp_path, monkeypatch):
    with reached(monkeypatch, tmp_path, Repository("some-org/m", dict(MODEL), gated=True)):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(CheckpointError) as caught:
            model_folder("some-org/m")
        assert "gives access on request" in one_line(caught) and "hf_wrong" not in str(caught.value)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert model_folder("some-org/m").is_dir()


def test_without_a_network_the_cache_serves_and_the_rest_is_one_line(tmp_path, monkeypatch):
    with reached(monkeypatch, tmp_path, Repository("some-org/m", dict(MODEL))):
        folder = model_folder("some-org/m")
    # The hub has ended: nothing listens on its port.
    assert model_folder("some-org/m") == folder
    with pytest.raises(CheckpointError, match=r"no such folder here, and http://127\S+ cannot be reached \("):
        model_folder("some-org/other")
    offline(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        model_folder("some-org/other")
    assert f"not in the cache ({tmp_path}), and HF_HUB_OFFLINE is set" in one_line(caught)


def test_a_download_that_was_cut_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    with reached(monkeypatch, tmp_path, Repository("some-org/m", dict(MODEL))):
        (model_folder("some-org/m") / "model.safetensors").unlink()
        offline(monkeypatch)
        with pytest.raises(CheckpointError) as caught:
            model_folder("some-org/m")
    assert "only a part of it is in the cache" in one_line(caught)


def test_a_published_dataset_is_read_by_split(tmp_path, monkeypatch):
    files = {
        "data/train-00000-of-00002.parquet": parquet(prompt=["a", "b"]),
        "data/train-00001-of-00002.parquet": parquet(prompt=["c"]),
        "data/test-00000-of-00001.parquet": parquet(prompt=["held out"]),
        "README.md": b"# Words\n",
        "dataset_infos.json": b"{}",
    }
    with reached(monkeypatch, tmp_path, dataset(files)) as hub:
        rows = [(row.place, row.values["prompt"]) for row in read_rows("some-org/Data")]
        assert rows == [
            ("train-00000-of-00002.parquet, row 1", "a"),
            ("train-00000-of-00002.parquet, row 2", "b"),
            ("train-00001-of-00002.parquet, row 1", "c"),
        ]
        # What is not asked for is not fetched.
        assert not any("test-00000" in path for path in hub.requests)
        assert [row.values["prompt"] for row in read_rows("some-org/Data", split="test")] == ["held out"]
        with pytest.raises(DataError, match=r"some-org/Data: no split 'dev'; it has: test, train"):
            dataset_files("some-org/Data", "dev")
        offline(monkeypatch)
        assert [row.values["prompt"] for row in read_rows("some-org/Data")] == ["a", "b", "c"]


def test_a_datasets_own_configuration_decides(tmp_path, monkeypatch):
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: words/*\n"
        "  - split: rest\n    path: [more.jsonl]\n---\n# Words\n"
    )
    files = {
        "README.md": card.encode(),
        "words/test.jsonl": b'{"n": 1}\n',
        "more.jsonl": b'{"n": 2}\n',
        "x.jsonl": b"no",
    }
    with reached(monkeypatch, tmp_path, dataset(files)):
        assert [row.values for row in read_rows("some-org/Data")] == [{"n": 1}]
        assert [row.values for row in read_rows("some-org/Data", split="rest")] == [{"n": 2}]
        with pytest.raises(DataError, match=r"no split 'test'; it has: rest, train"):
            dataset_files("some-org/Data", "test")


TWO_CONFIGURATIONS = """---
configs:
- {config_name: a, data_files: a*}
- {config_name: b, data_files: b*}
---
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": b"x"}, "some-org/Data: holds no .parquet, .jsonl, .json or .csv file"),
        (
            {"README.md": TWO_CONFIGURATIONS.encode()},
            "has several configurations (a, b)",
        ),
        ({"README.md": b"---\nconfigs: [[[}\n---\n", "a.jsonl": b'{"n": 1'}, "line 1: not valid JSON"),
        ({"train-00001-of-00002.jsonl": b"{}"}, "part 00000 of 2 is missing"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, files, expected):
    with reached(monkeypatch, tmp_path, dataset(files)), pytest.raises(DataError) as caught:
        list(read_rows("some-org/Data"))
    assert expected in one_line(caught)


def test_a_dataset_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    with reached(monkeypatch, tmp_path), pytest.raises(DataError) as caught:
        dataset_files("some-org/none")
    assert "dataset some-org/none: no such folder here, and no such dataset on" in one_line(caught)


def test_what_lies_here_comes_first(tmp_path, monkeypatch):
    (tmp_path / "some-org" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(model_folder("some-org/m")) == "some-org/m"
    assert model_folder("~/some-org/m") == tmp_path / "some-org" / "m"
    (tmp_path / "some-org" / "m" / "part-0.jsonl").write_text('{"n": 1}')
    (tmp_path / "some-org" / "m" / "ledger").mkdir()
    assert [row.values for row in read_rows("some-org/m")] == [{"n": 1}]
