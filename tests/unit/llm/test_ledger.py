"""The ledger on disk: what is read back, what is no record, and a disk without room."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.llm import ledger, ledger_index
from janus_ray.llm.ledger import Ledger, count_finished, index_ledger
from janus_ray.llm.ledger_line import parsed_line
from janus_ray.llm.request import Completion, Usage

GOOD = Completion("ok", text="an answer – with\nlines", finish_reason="stop", attempts=2, usage=Usage(3, 4), sent=2)


def line(**changes):
    return json.dumps({"key": "k", **asdict(GOOD), **changes})


def test_what_was_recorded_is_read_back_and_counts_as_not_sent_again(tmp_path):
    first = Ledger(tmp_path)
    first.record("k", GOOD)
    first.record("bad", Completion.failure("server", "boom", 1))
    again = Ledger(tmp_path)
    assert again.get("k") == GOOD.from_ledger()
    assert again.get("bad") is None
    assert (len(again), again.skipped, count_finished(tmp_path)) == (1, 0, 1)


def test_a_filtered_request_is_not_asked_again_and_a_later_success_counts_more(tmp_path):
    ledger = Ledger(tmp_path)
    filtered = Completion.failure("content_filter", "no", 1)
    ledger.record("k", filtered)
    assert Ledger(tmp_path).get("k") == filtered
    assert count_finished(tmp_path) == 0
    ledger.record("k", GOOD)
    ledger.record("k", filtered)
    assert Ledger(tmp_path).get("k") == GOOD.from_ledger()


@pytest.mark.parametrize(
    "odd",
    [
        "", "{}", "[]", "null", "3", '"text"', "{", line()[:-5], "[" * 100_000, "9" * 5000, "\x00",
        line(key=3), line(key=None), line(text=None), line(text=["x"]), line(status="fine"), line(status=["ok"]),
        line(status={}), line(usage=None), line(usage=[]), line(usage={"prompt_tokens": 1}),
        line(usage={"prompt_tokens": "1", "completion_tokens": 1}),
        line(usage={"prompt_tokens": -1, "completion_tokens": 1}),
        line(usage={"prompt_tokens": 10**20, "completion_tokens": 1}),
        line(usage={"prompt_tokens": True, "completion_tokens": 1}), line(attempts=1.5), line(attempts=None),
        line(sent="1"), line(finish_reason=["stop"]), line(finish_reason="error"), line(error_kind="unheard_of"),
        line(error_kind="server"), line(status="error"), line(error_message=3),
        line(text="x").replace('"x"', '"\\ud83d"'),
        line(text="x").replace('"x"', "1e999"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_skipped_and_counted(tmp_path, odd):
    (tmp_path / "1.jsonl").write_text(f"{odd}\n{line(key='good')}\n")
    ledger = Ledger(tmp_path)
    assert (len(ledger), ledger.skipped) == (1, 1)
    assert ledger.get("good") is not None
    assert ledger.get("k") is None


keys = st.sampled_from(["k", "m", "ф"])
lines = st.one_of(
    st.builds(lambda key, text: line(key=key, text=text), keys, st.text(max_size=5)),
    st.builds(lambda key: line(key=key, status="error", error_kind="content_filter", error_message="no"), keys),
    st.builds(lambda key: line(key=key, status="error", error_kind="server", error_message="down"), keys),
    st.builds(lambda key: line(key=key)[:-9], keys),
).map(str.encode) | st.binary(max_size=30)
logs = st.dictionaries(st.sampled_from(["1.jsonl", "2.jsonl", "3.jsonl"]), st.lists(lines, max_size=6))


@given(before=logs, after=logs, torn=st.binary(max_size=9), damage=st.sampled_from(["none", "cut", "flipped", "gone"]))
@settings(max_examples=40)
def test_whatever_lies_there_a_key_has_an_answer_that_was_recorded_for_it(before, after, torn, damage):
    """With an index of an earlier state beside it, also a damaged one, and a last line that was torn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in before.items():
            (folder / file).write_bytes(b"".join(each + b"\n" for each in content) + torn)
        index_ledger(folder, worth_lines=0)
        spoil(folder / "index.arrow", damage)
        for file, content in after.items():
            with (folder / file).open("ab") as stream:
                stream.write(b"".join(b"\n" + each for each in content))
        ledger = Ledger(folder)
        whole = b"\n".join(path.read_bytes() for path in folder.glob("*.jsonl")).split(b"\n")
        records = [record for each in whole if (record := as_record(each))]
        for key in ("k", "m", "ф", "never asked"):
            recorded = [record for record in records if record["key"] == key]
            told = ledger.get(key)
            good = [record["text"] for record in recorded if record["status"] == "ok"]
            if good:
                assert told is not None and told.status == "ok" and told.text in good
            elif any(record["error_kind"] == "content_filter" for record in recorded):
                assert told is not None and told.error_kind == "content_filter"
            else:
                assert told is None
        assert len(ledger) == len({record["key"] for record in records if record["status"] == "ok"})
        assert ledger.skipped >= sum(not as_record(each) for each in whole if each)


def as_record(content):
    try:
        value = json.loads(content)
        return value if isinstance(value, dict) and len(value) == len(json.loads(line())) else None
    except ValueError:
        return None


def spoil(index, damage):
    if not index.exists() or damage == "none":
        return
    content = bytearray(index.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    index.write_bytes(content[: -len(content) // 3] if damage == "cut" else content)
    if damage == "gone":
        index.unlink()


def test_an_index_of_other_files_is_not_believed(tmp_path):
    path = tmp_path / "1.jsonl"
    path.write_text(line(key="a", text="first") + "\n" + line(key="b") + "\n")
    index_ledger(tmp_path, worth_lines=0)
    assert (tmp_path / "index.arrow").is_file()
    # Edited by hand: as long as before, then shorter; then there is another file in its place.
    path.write_text(line(key="c", text="first") + "\n" + line(key="b") + "\n")
    os.utime(path, ns=(1, 1))
    assert [Ledger(tmp_path).get(key) is not None for key in "abc"] == [False, True, True]
    index_ledger(tmp_path, worth_lines=0)
    path.write_text(line(key="b", text="last") + "\n")
    assert [Ledger(tmp_path).get(key) is not None for key in "abc"] == [False, True, False]
    path.rename(tmp_path / "2.jsonl")
    assert Ledger(tmp_path).get("b").text == "last"
    assert len(Ledger(tmp_path)) == count_finished(tmp_path) == 1


def test_whoever_opens_an_indexed_ledger_reads_only_what_came_later(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(ledger_index, "parsed_line", lambda content: read.append(content) or parsed_line(content))
    first = Ledger(tmp_path)
    for number in range(3):
        first.record(f"k{number}", GOOD)
    index_ledger(tmp_path, worth_lines=3)
    read.clear()
    first.record("later", GOOD)
    again = Ledger(tmp_path)
    assert [json.loads(content)["key"] for content in read] == ["later"]
    assert all(again.get(key) == GOOD.from_ledger() for key in ("k0", "k1", "k2", "later"))
    assert (again.get("k3"), len(again)) == (None, 4)


def test_a_ledger_on_an_object_storage_tells_what_it_recorded_also_before_it_is_there(s3, monkeypatch):
    monkeypatch.setattr(ledger, "_RECENT_BYTES", 1000)
    folder = f"{s3.folder()}/ledger"
    first = Ledger(folder)
    for number in range(20):
        first.record(f"k{number}", replace(GOOD, text=f"answer {number}"))
        assert first.get(f"k{number}").text == f"answer {number}"
    # Recorded long ago, and nothing of it in memory any more.
    assert first.get("k0").text == "answer 0"
    assert (first.get("other"), len(first)) == (None, 20)
    first.close()
    index_ledger(folder, worth_lines=0)
    again = Ledger(folder)
    assert [again.get(f"k{number}").text for number in range(20)] == [f"answer {number}" for number in range(20)]
    again.record("k20", GOOD)
    again.flush()
    assert count_finished(folder) == 21
    s3.fail("refuse", "PUT")
    again.record("k21", GOOD)
    with pytest.raises(DataError):
        again.flush()
    with pytest.raises(
        DataError, match=r"an answer cannot be recorded: .*; run again with --if-exists resume"
    ) as error:
        again.record("k22", GOOD)
    assert "\n" not in str(error.value)
    s3.heal()
    again.close()


def test_a_full_disk_is_one_line_and_leaves_no_torn_record(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.record("first", GOOD)
    size = next(tmp_path.glob("*.jsonl")).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be recorded: .*make room .* --if-exists resume") as error:
            ledger.record("second", GOOD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    # What was recorded is still told; for what was not, nothing more is paid.
    assert ledger.get("first") == GOOD.from_ledger()
    with pytest.raises(DataError, match="cannot be recorded"):
        ledger.get("second")
    ledger.record("third", GOOD)
    again = Ledger(tmp_path)
    assert (len(again), again.skipped, again.get("second")) == (2, 0, None)


def test_a_folder_where_nothing_can_be_written_or_read_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be recorded"):
        Ledger(tmp_path / "file" / "ledger").record("k", GOOD)
    (tmp_path / "1.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        Ledger(tmp_path)
