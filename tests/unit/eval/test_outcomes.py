from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from janus_ray.errors import DataError
from janus_ray.eval import outcomes as module
from janus_ray.eval.outcomes import kept_outcomes
from janus_ray.eval.rows import read_back
from janus_ray.llm.request import Completion, Usage

COMPLETIONS = st.builds(
    Completion,
    status=st.just("ok"),
    text=st.text(max_size=20) | st.just("\ud83d \x00\u2028\n"),
    finish_reason=st.sampled_from(["stop", "length"]),
    attempts=st.integers(0, 9),
    usage=st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
) | st.builds(Completion.failure, st.sampled_from(["server", "empty"]), st.text(max_size=9), st.integers(0, 9))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), COMPLETIONS), max_size=12))
def test_each_number_has_what_was_put_there_last(tmp_path_factory, puts):
    with kept_outcomes(UPath(tmp_path_factory.getbasetemp())) as outcomes:
        for number, completion in puts:
            outcomes.put(number, completion)
        assert [outcomes.get(number) for number in range(14)] == [dict(puts).get(number) for number in range(14)]


def test_an_answer_that_is_written_in_part_is_a_full_disk(monkeypatch):
    half = SimpleNamespace(pwrite=lambda file, content, place: len(content) // 2, strerror=os.strerror)
    monkeypatch.setattr(module, "os", half)
    with pytest.raises(OSError, match="No space left") as caught:
        module.Outcomes(0).put(0, Completion("ok", "x"))
    assert caught.value.errno == errno.ENOSPC


def test_rows_that_somebody_changed_are_refused_by_their_line(tmp_path):
    path = UPath(tmp_path / "rows.jsonl")
    path.write_text('{"a": 1}\nb\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: is no row of ours any more; run again$"):
        list(read_back(path))
    with pytest.raises(DataError, match="none"):
        list(read_back(UPath(tmp_path / "none")))
