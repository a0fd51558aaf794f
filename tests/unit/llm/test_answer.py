"""Reading answers: what is one, what is none, and what of it a person should see."""

from __future__ import annotations

import json

import pytest

from janus_ray.llm.answer import read_answer
from janus_ray.llm.thoughts import without_thoughts


def body(content="half an answer", finish_reason="stop", *, message=None, choice=None, **changes):
    entry = {"finish_reason": finish_reason, "message": {"content": content, **(message or {})}, **(choice or {})}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return json.dumps({"choices": [entry], "usage": usage, **changes}).encode()


def read(content: bytes, keep_truncated=False):
    return read_answer(content, keep_truncated=keep_truncated).outcome


@pytest.mark.parametrize(
    "reason", ["stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "COMPLETE", "FINISH_REASON_STOP"]
)
def test_a_finished_answer_however_the_server_says_so(reason):
    outcome = read(body("done", reason))
    assert (outcome.status, outcome.text, outcome.finish_reason) == ("ok", "done", "stop")
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("error", "server"),
        ("abort", "server"),
        ("insufficient_system_resource", "server"),
        (None, "unfinished"),
        ("", "unfinished"),
        ("repetition", "unfinished"),
        ("pause_turn", "unfinished"),
        (7, "unfinished"),
        (True, "unfinished"),
        (["stop"], "unfinished"),
        ({"a": 1}, "unfinished"),
        ("tool_calls", "unfinished"),
        ("function_call", "unfinished"),
        ("tool_use", "unfinished"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
        ("content-filter", "content_filter"),
        ("length", "truncated"),
        ("MAX_TOKENS", "truncated"),
        ("model_length", "truncated"),
    ],
)
def test_an_answer_is_never_taken_for_more_than_it_is(reason, kind):
    outcome = read(body(finish_reason=reason))
    assert (outcome.status, outcome.error_kind, outcome.text) == ("error", kind, "")
    assert outcome.error_message
    # What was paid for is counted all the same.
    assert outcome.usage.completion_tokens == 2


def test_a_cut_answer_is_kept_where_the_request_keeps_it_and_there_is_one():
    kept = read(body("half", "max_tokens"), keep_truncated=True)
    assert (kept.status, kept.text, kept.finish_reason) == ("ok", "half", "length")
    for nothing in (None, "", " \n", "<think>so far", "<think>a</think>\n"):
        reading = read_answer(body(nothing, "length"), keep_truncated=True)
        assert reading.outcome.error_kind == "truncated"
        assert reading.before_any_text


def test_a_server_that_never_says_how_an_answer_ended_is_measured_by_its_tokens():
    content = json.dumps({"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": 8}}).encode()
    assert read_answer(content, keep_truncated=False, max_tokens=9).outcome.status == "ok"
    assert read_answer(content, keep_truncated=False, max_tokens=8).outcome.error_kind == "truncated"


@pytest.mark.parametrize("calls", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}])
def test_a_tool_call_is_no_answer_even_if_the_server_calls_it_finished(calls):
    assert read(body("Let me look.", message=calls)).error_kind == "unfinished"
    assert read(body("fine", message={"tool_calls": [], "function_call": None})).text == "fine"


@pytest.mark.parametrize(
    ("refusal", "kind", "said"),
    [
        ("I cannot", "refusal", "I cannot"),
        ({"a": 1}, "refusal", '{"a": 1}'),
        (["no", "never"], "refusal", "no; never"),
        (True, "refusal", "refused"),
        (3, "refusal", "refused"),
        ("no \ud83d", "refusal", "no �"),
        (None, None, None),
        ("", None, None),
        ([], None, None),
        (False, None, None),
    ],
)
def test_a_refusal_of_any_type(refusal, kind, said):
    outcome = read(body("fine", message={"refusal": refusal}))
    assert (outcome.error_kind, outcome.error_message) == (kind, said)


@pytest.mark.parametrize("odd", ["1e999", "-1", "1.5", "true", '"3"', "null", "[]", "{}", "1e3", str(10**20), "NaN"])
def test_a_count_that_is_none_is_dropped(odd):
    content = body(usage="HERE").replace(b'"HERE"', f'{{"prompt_tokens": {odd}, "completion_tokens": 4}}'.encode())
    outcome = read(content)
    assert (outcome.status, outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == ("ok", 0, 4)
    whole = read(body(usage="HERE").replace(b'"HERE"', odd.encode()))
    assert (whole.status, whole.usage.completion_tokens) == ("ok", 0)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"text": "a"}, "b", None], "ab"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "output_text", "text": "a"}], "a"),
        ({"type": "text", "text": "a"}, "a"),
        ("\ufeffa", "a"),
        ("a\x00b", "a\x00b"),
        ("ok \ud83d", "ok �"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_content_in_parts_and_odd_characters(content, text):
    assert (read(body(content)).status, read(body(content)).text) == ("ok", text)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"{}", b"3", b'"text"', b"<html>gateway</html>", b"data: {}", b"\xff\xfe\x00", b"\x00",
        b"[" * 100_000, b'{"choices":' * 5000, b"9" * 5000, b'{"choices": "no"}', b'{"choices": []}',
        b'{"choices": [null]}', b'{"choices": [[]]}', b'{"choices": {"0": {}}}', b'{"choices": [{}]}',
        b'{"choices": [{"message": "hi", "finish_reason": "stop"}]}', b'{"choices": [{"text": "old"}]}',
        body(3), body([3]), body([[{"text": "x"}]]), body({"text": 3}), body([{"type": "image_url", "text": "x"}]),
        body(True), body([{"type": ["text"], "text": "x"}]), body()[:-20],
    ],
)  # fmt: skip
def test_what_is_no_completion_is_a_failure_of_the_server(content):
    outcome = read(content)
    assert (outcome.status, outcome.error_kind) == ("error", "server")
    assert outcome.error_message.startswith("the answer is not a chat completion")
    assert outcome.error_message.isprintable()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ({"error": {"code": 402, "message": "no credit"}}, "quota", "no credit"),
        ({"error": {"code": "402", "message": "no credit"}}, "quota", "no credit"),
        ({"error": {"code": 429, "message": "slow down"}}, "rate_limit", "slow down"),
        ({"error": {"code": "rate_limit_exceeded", "message": "slow down"}}, "rate_limit", "slow down"),
        ({"error": {"code": 429.0, "message": "slow down"}}, "rate_limit", "slow down"),
        ({"error": {"code": 502, "message": "bad gateway"}}, "server", "bad gateway"),
        ({"error": {"code": None, "message": "odd"}}, "server", "odd"),
        ({"error": {"code": True, "message": "odd"}}, "server", "odd"),
        ({"error": "it broke"}, "server", "it broke"),
        ({"error": "Rate limit reached"}, "rate_limit", "Rate limit reached"),
        ({"error": {"code": "Too Many Requests", "message": "slow down"}}, "rate_limit", "slow down"),
        ({"error": {"code": "HTTP 429", "message": "slow down"}}, "rate_limit", "slow down"),
        ({"error": {"code": "502 Bad Gateway", "message": "gone"}}, "server", "gone"),
        ({"error": {"type": "insufficient balance", "message": "no credit"}}, "quota", "no credit"),
        ({"error": {"message": "who?", "type": "authentication_error"}}, "auth", "who?"),
        ({"error": {"message": "too long", "code": "context_length_exceeded"}}, "bad_request", "too long"),
        ({"error": {"message": "no", "code": "content_filter"}}, "content_filter", "no"),
        ({"error": {"message": "no", "type": "insufficient_quota"}}, "quota", "no"),
        ([{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow"}}], "rate_limit", "slow"),
        ({"code": 429, "msg": "slow"}, "rate_limit", "slow"),
        (
            {"choices": [{"error": {"code": 502, "message": "upstream"}, "finish_reason": "error"}]},
            "server",
            "upstream",
        ),
        (
            {"error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": "busy at theirs"}}},
            "rate_limit",
            "busy at theirs",
        ),
    ],
)
def test_an_error_with_http_200_is_the_error_that_it_names(answer, kind, words):
    outcome = read(json.dumps(answer).encode())
    assert (outcome.status, outcome.error_kind) == ("error", kind)
    assert words in outcome.error_message
    beside = json.loads(body("an answer"))
    if isinstance(answer, dict) and "error" in answer:
        assert read(json.dumps(beside | answer).encode()).error_kind == kind
    for none in (None, {}, "", False, {"code": None, "message": None}):
        assert read(json.dumps(beside | {"error": none}).encode()).text == "an answer"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>hm</think>answer", "answer"),
        ("<think>\nhm\n</think>\n\nanswer", "\n\nanswer"),
        ("<THINK>hm</THINK>answer", "answer"),
        ("<thinking>hm</thinking>answer", "answer"),
        ("<think></think>answer", "answer"),
        ("hm</think>answer", "answer"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("<think>a <think>b</think> c</think>answer", "answer"),
        ("<think>shall I use <think> tags?</think>answer", "answer"),
        ("[THINK]hm[/THINK]answer", "answer"),
        ("◁think▷hm◁/think▷answer", "answer"),
        ("<seed:think>hm</seed:think>answer", "answer"),
        ("<|begin_of_thought|>hm<|end_of_thought|>answer", "answer"),
        ("<reasoning>hm</reasoning>answer", "answer"),
        ("<thought>hm</thought>answer", "answer"),
        ("<reflection>hm</reflection>answer", "answer"),
        ("<scratchpad>hm</scratchpad>answer", "answer"),
        ("hm</reasoning>answer", "answer"),
        ('<think duration="3">hm</think>answer', "answer"),
        ("<x:think>hm</x:think>answer", "answer"),
        ("<|think|>hm<|/think|>answer", "answer"),
        (
            "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>answer<|END_RESPONSE|>",
            "answer",
        ),
        (
            "<|begin_of_thought|>hm<|end_of_thought|>\n\n<|begin_of_solution|>answer<|end_of_solution|>",
            "answer",
        ),
        ("End it with `</reasoning>`.", "End it with `</reasoning>`."),
        ('<think>he said "x"</think>"answer"', '"answer"'),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>",
            "answer",
        ),
        ("Write `<think>` and `</think>` around it.", "Write `<think>` and `</think>` around it."),
        ("Reply:\n<reasoning>as asked</reasoning>", "Reply:\n<reasoning>as asked</reasoning>"),
        ("1 < 2 and think > 3", "1 < 2 and think > 3"),
    ],
)
def test_thoughts_are_left_out_and_nothing_else_is(text, shown):
    assert without_thoughts(text).text == shown
    outcome = read(body(text))
    assert (outcome.status, outcome.text) == ("ok", shown)


@pytest.mark.parametrize(
    ("text", "reason", "kind"),
    [
        ("<think>on and on", "stop", "unfinished"),
        ("<think>on and on", "length", "truncated"),
        ("<reasoning>on and on", "length", "truncated"),
        ('<think duration="3">on and on', "stop", "unfinished"),
        ("<|START_THINKING|>on and on", "length", "truncated"),
        ("<|think|>on and on", "stop", "unfinished"),
        ("<think>only thoughts</think>", "stop", "empty"),
        ("only thoughts</think>\n", "stop", "empty"),
        ("fine <think>but", "stop", "unfinished"),
        ("<think>end with </think>, I must</think>answer", "stop", "unfinished"),
        ("<|channel|>analysis<|message|>on and on", "stop", "unfinished"),
    ],
)
def test_thoughts_alone_are_no_answer(text, reason, kind):
    assert read(body(text, reason)).error_kind == kind


@pytest.mark.parametrize("nothing", ["\u200b", "\0", " \ufeff\u200b\n", "<think>hm</think>\u200b"])
def test_what_nobody_can_see_is_no_answer(nothing):
    assert read(body(nothing)).error_kind == "empty"
    assert read(body(nothing, "length"), keep_truncated=True).error_kind == "truncated"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_field_of_their_own_are_never_the_text(field):
    assert read(body("answer", message={field: "secret thoughts"})).text == "answer"
    for content, reason, kind in ((None, "length", "truncated"), (None, "stop", "empty"), ("", "stop", "empty")):
        outcome = read(body(content, reason, message={field: "secret thoughts"}))
        assert (outcome.error_kind, outcome.text) == (kind, "")
        assert "thoughts" in outcome.error_message
        assert "secret" not in outcome.error_message
