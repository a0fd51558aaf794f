"""The ledger on disk: what is read back, what is no record, and a disk without room."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import DataError
from janus_ray.llm.ledger import Ledger, count_finished
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


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_break_the_reader(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "hostile_ledger"
    folder.mkdir(exist_ok=True)
    (folder / "1.jsonl").write_bytes(content + b"\n" + line(key="good").encode() + b"\n")
    ledger = Ledger(folder)
    assert len(ledger) == 1
    assert ledger.get("good") == GOOD.from_ledger()


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
