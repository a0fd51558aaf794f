"""Conversations of several turns: what is read of them, what is left out, and where their loss is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from janus_ray.chat import EncodedExample, loss_stretches, use_template
from janus_ray.errors import DataError
from janus_ray.model_folder import load_tokenizer, save_tokenizer
from janus_ray.store.files import files_below
from janus_ray.store.shards import TokenShards
from janus_ray.store.tables import write_parquet
from janus_ray.text import is_blank
from janus_ray.train.collection import left_out, read_collection
from janus_ray.train.conversations import REASONS, is_nothing, read_messages
from janus_ray.train.documents import audit_documents, in_words
from janus_ray.train.plan import read_plan
from janus_ray.train.prepare import in_this_process, prepare
from janus_ray.train.recipe import TrainRecipe
from janus_ray.train.run import _print_data
from tests import tokenizer_kinds as kinds


def said(role, content, **more):
    return {"role": role, "content": content, **more}


SYSTEM, ONE, TWO = said("system", "You are brief."), said("user", "One?"), said("user", "Two?")
YES, NO = said("assistant", "Yes."), said("assistant", "No </s> way.")
CHAT = [SYSTEM, ONE, YES, TWO, NO]
PARTS = [{"type": "text", "text": "On"}, {"type": "text", "text": "e?", "image_url": None}]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        (CHAT, CHAT),
        ([ONE, YES], [ONE, YES]),
        ([said("developer", "You are brief."), ONE, YES], [SYSTEM, ONE, YES]),
        ([SYSTEM, said("developer", "Be kind."), ONE, YES], [said("system", "You are brief.\n\nBe kind."), ONE, YES]),
        ([said("system", None), ONE, YES], [ONE, YES]),
        ([said("system", " \n"), ONE, YES], [ONE, YES]),
        ([said("user", PARTS), YES], [ONE, YES]),
        ([ONE, said("assistant", [{"type": "text", "text": "Yes."}, {"type": "text", "text": None}])], [ONE, YES]),
        (
            [said("user", " One?\n"), said("assistant", " Yes. ")],
            [said("user", " One?\n"), said("assistant", " Yes. ")],
        ),
        # As the SDK's model_dump() and Parquet's structs have it: every field of every message, most of them null.
        ([{**ONE, "weight": 0, "name": "Ann"}, {**YES, "weight": 1, "tool_calls": [], "refusal": None}], [ONE, YES]),
        ([ONE, {**YES, "function_call": {"name": None, "arguments": ""}, "audio": None, "weight": None}], [ONE, YES]),
        ([ONE, YES, TWO, said("tool", "7"), NO], "rows_with_tool_calls"),
        ([ONE, said("assistant", None, tool_calls=[CALL])], "rows_with_tool_calls"),
        ([ONE, said("assistant", "Yes.", function_call={"name": "f", "arguments": "{}"})], "rows_with_tool_calls"),
        ([said("human", "One?"), said("gpt", "Yes.")], "rows_with_other_roles"),
        ([said("User", "One?"), YES], "rows_with_other_roles"),
        ([said("user", [*PARTS, IMAGE]), YES], "rows_with_other_parts"),
        ([ONE, said("assistant", None, audio={"id": "a"})], "rows_with_other_parts"),
        ([ONE, {**YES, "weight": 0}, TWO, NO], "rows_with_weights"),
        ([ONE, YES, SYSTEM, TWO, NO], "rows_out_of_turn"),
        ([ONE, TWO, YES], "rows_out_of_turn"),
        ([ONE, YES, NO], "rows_out_of_turn"),
        ([YES, ONE, NO], "rows_out_of_turn"),
        ([SYSTEM], "rows_without_prompt"),
        ([said("user", None), YES], "rows_without_prompt"),
        ([ONE, YES, said("user", "\u200b"), NO], "rows_without_prompt"),
        ([ONE], "rows_without_output"),
        ([ONE, YES, TWO], "rows_without_output"),
        ([ONE, said("assistant", "", refusal="I cannot.")], "rows_without_output"),
        ([ONE, said("assistant", []), TWO, NO], "rows_without_output"),
    ],
)
def test_a_conversation_is_read_or_left_out_with_its_reason(tmp_path, messages, read):
    rows = [{"messages": [ONE, YES]}, {"messages": messages}]
    for source in (write_lines(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        if source.endswith("parquet"):
            try:
                write_parquet(source, pa.Table.from_pylist(rows))
            except pa.ArrowException:
                # A column of both texts and parts.
                continue
        collection = read_collection(source)
        found = collection.rows.take(range(len(collection.rows)))
        kept = isinstance(read, list)
        assert found == [[ONE, YES], *([read] if kept else [])]
        counts = {name: count for name, count in collection.counts.items() if count}
        assert counts.pop("rows") == len(found)
        assert counts.pop("rows_without_system") == sum(each[0]["role"] == "user" for each in found)
        assert counts == ({} if kept else {read: 1})
        assert left_out(collection.counts) == ("" if kept else f"1 {REASONS[read]}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "[]"}, "messages is text, expected a list of messages"),
        ({"messages": ONE}, "messages is an object, expected a list of messages"),
        ({"messages": 7}, "messages is a number, expected a list of messages"),
        ({"messages": ["One?", "Yes."]}, r"messages\[0\] is text, expected an object with role and content"),
        ({"messages": [ONE, [YES]]}, r"messages\[1\] is a list, expected an object with role and content"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] has no role, .*; it has: from, value"),
        ({"messages": [{}]}, r"messages\[0\] has no role, expected role and content; it has: nothing"),
        ({"messages": [said(1, "x")]}, r"messages\[0\]\.role is a number, expected text"),
        ({"messages": [said("user", 7)]}, r"messages\[0\]\.content is a number, expected text or a list of text parts"),
        ({"messages": [said("user", {"text": "x"})]}, r"messages\[0\]\.content is an object, expected text or a list"),
        ({"messages": [said("user", ["x"])]}, r"messages\[0\]\.content\[0\] is text, expected a text part"),
        (
            {"messages": [said("user", [{"text": "x"}])]},
            r".*content\[0\] is an object without type, expected a text part",
        ),
        ({"messages": [said("user", [{"type": "text", "text": 1}])]}, r".*\.text is a number, expected text"),
        (
            {"messages": [ONE, YES], "output": "So."},
            "both messages and output are filled; one of the two must be empty",
        ),
        ({"messages": [ONE, YES], "system": "So."}, "both messages and system are filled"),
        ({"messages": [ONE, YES], "prompt": "Why?", "output": "So."}, "both messages and output are filled"),
        ({"messages": [ONE, YES], "prompt": "Why?"}, "both messages and prompt are filled"),
        ({"messages": [ONE, said("tool", "x")], "prompt": "Why?", "output": "So."}, "both messages and output are"),
    ],
)
def test_what_is_no_conversation_or_two_of_them_is_refused_with_its_row(tmp_path, row, words):
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {words}") as caught:
        read_collection(write_lines(tmp_path / "rows.jsonl", [{"messages": [ONE, YES]}, row]))
    assert "\n" not in str(caught.value)


def test_both_forms_may_stand_in_one_collection_but_not_in_one_row(tmp_path):
    single = {"system": "You are brief.", "prompt": "One?", "output": "Yes."}
    rows = [
        single,
        {**single, "messages": []},
        # Published sets repeat the first prompt beside the conversation.
        {"prompt": "One? ", "messages": CHAT},
        {"messages": None},
        {"system": None, "prompt": "", "output": None, "messages": [ONE, YES]},
        {"messages": CHAT, "status": "error"},
    ]
    every = dict.fromkeys([*single, "messages"]) | {"status": "ok"}
    write_parquet(tmp_path / "rows.parquet", pa.Table.from_pylist([{**every, **row} for row in rows]))
    for source in (write_lines(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")):
        collection = read_collection(source)
        expected = [[SYSTEM, ONE, YES], [SYSTEM, ONE, YES], CHAT, [ONE, YES]]
        assert collection.rows.take(range(len(collection.rows))) == expected
        assert (collection.counts["rows"], collection.counts["rows_without_system"]) == (4, 1)
        assert left_out(collection.counts) == "1 whose status is not ok, 1 without prompt"
    with pytest.raises(
        DataError, match="no column 'system'; it has: prompt; expected system, prompt and output, or mess"
    ):
        read_collection(write_lines(tmp_path / "rows.jsonl", [{"prompt": "x"}]))


_ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.floats()
    | st.sampled_from(["", "One?", "user", "text", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
_TEXT = st.just("One?") | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.just("One?")}), max_size=2
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"]) | _ODD},
    optional={"content": _TEXT | _ODD, "weight": st.sampled_from([0, 1]) | _ODD, "tool_calls": _ODD},
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_MESSAGE, max_size=5) | _ODD.filter(lambda value: not is_nothing(value)))
@example([said("user", "One?"), said("assistant", "One?")])
def test_hostile_messages_are_read_named_or_refused(value):
    try:
        read = read_messages(value, "row 1")
    except DataError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("row 1: messages")
        return
    if isinstance(read, str):
        assert read in REASONS
        return
    turns = read[read[0]["role"] == "system" :]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    there = json.dumps(value)
    for message in read:
        assert not is_blank(message["content"])
        assert all(json.dumps(part)[1:-1] in there for part in message["content"].replace("\n\n", "?").split("?"))


def test_stretches_of_loss():
    assert loss_stretches([]) == loss_stretches([0, 0]) == []
    assert loss_stretches([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)]
    assert loss_stretches([True, False]) == [(0, 1)]


@pytest.fixture(scope="module")
def encoder():
    return use_template(kinds.chatml(), "own")


def test_the_audit_finds_every_wrong_mask_of_several_turns(encoder):
    [example] = encoder.encode_conversation(CHAT)
    encoder.audit_conversation([example], CHAT)
    (start, stop), (again, end) = loss_stretches(example.loss_mask)

    def masked(*loss):
        return replace(example, loss_mask=[any(a <= index < b for a, b in loss) for index in range(end)])

    for wrong in (
        masked((start, end)),
        masked((start, stop)),
        masked((again, end)),
        masked((start + 1, stop), (again, end)),
        masked((start, stop - 1), (again, end)),
        masked((start, stop), (again + 1, end)),
        masked((start, stop), (again, end - 1)),
        masked((start, stop), (stop + 5, end)),
        masked((start, stop), (stop + 1, again - 1), (again, end)),
        EncodedExample([*example.input_ids, 5], [*example.loss_mask, False]),
    ):
        with pytest.raises(DataError, match="mask audit"):
            encoder.audit_conversation([wrong], CHAT)
    with pytest.raises(DataError, match="mask audit"):
        encoder.audit_conversation([example], [*CHAT[:2], NO, TWO, YES])


def test_the_audit_of_packed_documents_takes_several_stretches_and_refuses_wrong_ones(encoder):
    [example] = encoder.encode_conversation(CHAT)
    (start, stop), (again, end) = loss_stretches(example.loss_mask)

    def packed(*loss):
        mask = [int(any(a <= index < b for a, b in loss)) for index in range(end)]
        return np.array(example.input_ids), np.array(mask, dtype=bool)

    def audit(ids, mask):
        # Between two sound ones, so that what a neighbour holds counts for nothing.
        sound = packed((start, stop), (again, end))
        ids, mask = (np.concatenate([a, b, a]) for a, b in zip(sound, (ids, mask), strict=True))
        audit_documents(ids, mask, np.array([end] * 3), encoder)

    audit(*packed((start, stop), (again, end)))
    shown = in_words(*packed((start, stop), (again, end)), encoder)
    assert "assistant\\n' + loss on 'Yes.<|im_end|>' + '\\n<|im_start|>user\\nTwo?" in shown
    assert shown.endswith(" + loss on 'No </s> way.<|im_end|>'")
    for wrong in (
        [(start, end)],
        [(start, stop - 1), (again, end)],
        [(start, stop + 1), (again, end)],
        [(start, stop)],
        [(0, stop), (again, end)],
        [],
    ):
        with pytest.raises(DataError, match="mask audit"):
            audit(*packed(*wrong))


@pytest.fixture
def prepared(tmp_path):
    """Prepares a collection as a run does, without Ray's processes."""

    def run(tokenizer, chat_template, rows, max_length=128):
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        save_tokenizer(tokenizer, base)
        source = write_lines(tmp_path / "rows.jsonl", rows)
        settings = {"collection": source, "base_model": str(base), "chat_template": chat_template}
        recipe = TrainRecipe(output_dir="out", max_length=max_length, **settings)
        counts = prepare(recipe, read_collection(source), tmp_path, in_this_process)
        _print_data(counts, recipe)
        return counts, documents(tmp_path, use_template(load_tokenizer(base), chat_template).tokenizer)

    return run


def documents(folder, tokenizer):
    """What carries loss in every document of the plan, in words."""
    shards, plan = TokenShards(folder / "documents"), read_plan(folder / "plan.npz")
    found = []
    for number in range(len(plan.bins)):
        for ids, mask in (shards[index] for index in plan.documents_of(number)):
            found.append([tokenizer.decode(ids[begin:end]).strip() for begin, end in loss_stretches(mask)])
    return sorted(found)


@pytest.mark.parametrize("chat_template", ["janus", "own"])
def test_every_assistant_turn_of_a_collection_is_packed_with_loss(prepared, capsys, chat_template):
    end = "<|im_end|>"
    rows = [{"messages": CHAT}, {"messages": CHAT[1:]}, {"prompt": "One?", "output": "Yes."}, {"messages": [ONE]}]
    counts, found = prepared(kinds.chatml(), chat_template, rows)
    assert found == [[f"Yes.{end}"], *[[f"Yes.{end}", f"No </s> way.{end}"]] * 2]
    assert (counts["rows"], counts["documents"], counts["rows_without_system"]) == (3, 3, 2)
    assert "train: 3 rows (2 have no system message); left out: 1 without output\n" in capsys.readouterr().out


def test_a_template_that_rewrites_the_past_makes_more_documents_than_rows(prepared, capsys):
    thought = said("assistant", "<think>\nhm\n</think>\n\nYes.")
    counts, found = prepared(kinds.chatml(kinds.THINKING), "own", [{"messages": [ONE, thought, TWO, NO]}] * 2)
    first, second = ["<think>\nhm\n</think>\n\nYes.<|im_end|>"], ["<think>\n\n</think>\n\nNo </s> way.<|im_end|>"]
    assert found == sorted([first, first, second, second])
    assert (counts["rows"], counts["documents"]) == (2, 4)
    assert "train: 2 rows in 4 documents (2 have no system" in capsys.readouterr().out


def test_a_conversation_too_long_is_left_out_whole(prepared):
    long = said("assistant", "Yes. " * 40)
    for template in (kinds.CHATML, kinds.THINKING):
        rows = [{"messages": [ONE, YES]}, {"messages": [ONE, YES, TWO, long]}]
        counts, found = prepared(kinds.chatml(template), "own", rows, 100)
        assert (counts["rows"], counts["rows_too_long"], counts["documents"]) == (2, 1, 1)
        assert len(found) == 1


def test_a_row_that_the_template_refuses_is_left_out_and_said(prepared, capsys):
    rows = [{"messages": CHAT[1:]}] * 3 + [{"messages": CHAT}]
    counts, found = prepared(kinds.gemma(), "own", rows)
    assert found == [["Yes.<end_of_turn>", "No </s> way.<end_of_turn>"]] * 3
    assert (counts["rows"], counts["rows_refused_by_template"], counts["documents"]) == (4, 1, 3)
    printed = capsys.readouterr().out
    assert (
        "train: refused by the chat template: 1 of 4 rows are left out, the first: row with the prompt 'One?': "
        in printed
    )
    assert "System role not supported" in printed
    assert "train: 3 rows (3 have no system message); left out: 1 refused by the chat template\n" in printed


def test_a_template_that_refuses_more_than_single_rows_stops_before_anything_is_packed(prepared, tmp_path):
    rows = [{"messages": CHAT[1:3]}] * 3 + [{"messages": CHAT}] * 2
    words = r"rows\.jsonl: the chat template refuses 2 of the 5 rows looked at, the first: row with the prompt .*janus"
    with pytest.raises(DataError, match=words):
        prepared(kinds.gemma(), "own", rows)
    with pytest.raises(DataError, match="refuses 1 of the 1 rows"):
        prepared(kinds.gemma(), "own", rows[-1:])
    assert files_below(tmp_path / "documents") == []
