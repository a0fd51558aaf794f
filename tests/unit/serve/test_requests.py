"""What callers of every kind send: what is taken, what is refused, and what then reaches the engine."""

from __future__ import annotations

import json
import math
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage, completion_create_params

from janus_ray.config import validate
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.serve.refusals import ApiError
from janus_ray.serve.requests import IGNORED, EngineRequest, parse_chat, parse_preview

USER = {"role": "user", "content": "Hello?"}
RECIPE = validate(ServeRecipe, {"models": [{"model_id": "m", "path": "x"}], "max_tokens": 500}, "test")


def parsed(**fields: Any) -> EngineRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), RECIPE)


def messages(*given: dict) -> list[dict]:
    return parsed(messages=list(given)).body["messages"]


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(**fields)
    assert caught.value.status == 400
    assert caught.value.message.isprintable() and len(caught.value.message) < 400
    return caught.value


OPENAI_FIELDS = sorted(
    typing.get_type_hints(completion_create_params.CompletionCreateParamsStreaming).keys() - {"model", "messages"}
)


def test_every_optional_field_of_openais_may_be_null():
    assert len(OPENAI_FIELDS) > 30
    everything = parsed(**dict.fromkeys([*OPENAI_FIELDS, "janus", "top_k", "min_p", "ignore_eos", "unheard_of"]))
    assert everything.body == {"model": "m", "messages": [USER]} and everything.ignored == ()
    inner = parsed(stream=True, stream_options={"include_usage": None}, response_format={"type": "text"})
    assert inner.body == {"model": "m", "messages": [USER], "stream": True, "stream_options": {}}


@pytest.mark.parametrize("field", OPENAI_FIELDS)
def test_no_field_of_openais_is_dropped_in_silence(field):
    """A value either reaches the engine, or is named in the header, or is refused by name."""
    odd = {"odd": "value"}
    try:
        taken = parsed(**{field: odd})
    except ApiError as error:
        assert error.param is not None and error.param.split(".")[0] == field and field in error.message
    else:
        assert taken.ignored == (field,) and field not in taken.body


def test_what_cannot_change_an_answer_is_ignored_by_name():
    given = {"store": True, "metadata": {"a": "b"}, "parallel_tool_calls": False, "service_tier": "auto", "user": "u"}
    given |= {"safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h"}
    taken = parsed(**given)
    assert taken.body == {"model": "m", "messages": [USER]}
    assert sorted(taken.ignored) == sorted(given) and set(given) <= set(IGNORED)


@pytest.mark.parametrize(
    "harmless",
    [
        {"modalities": ["text"]},
        {"tool_choice": "none"},
        {"verbosity": "medium"},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0},
        {"stop": []},
        {"stream": False},
    ],
)
def test_a_value_that_says_what_happens_anyway_is_taken(harmless):
    body = parsed(**harmless).body
    assert {name: body[name] for name in ("model", "messages")} == {"model": "m", "messages": [USER]}
    assert not {"modalities", "tool_choice", "verbosity", "response_format", "stop"} & set(body)


@pytest.mark.parametrize(
    ("field", "values", "range_words"),
    [
        ("temperature", [-0.1, 2.1, 1e300, True, "0.5", [], {}], "a number from 0 to 2"),
        ("top_p", [0, -1, 1.1, True, "1"], "a number above 0, up to 1"),
        ("min_p", [-0.1, 1.1, False, "0"], "a number from 0 to 1"),
        ("presence_penalty", [-2.1, 2.1, True, "1"], "a number from -2 to 2"),
        ("frequency_penalty", [-2.1, 2.1, False, "1"], "a number from -2 to 2"),
        ("repetition_penalty", [1e-320, 0, -1, 1e-9, 1e9, True, "1.1"], "a number from 0.01 to 100"),
        ("top_k", [-2, 2**70, 2**31, 1.5, True, "3"], "a whole number from -1 to 1000000"),
        ("n", [0, -1, 1.5, True, "1"], "a whole number from 1"),
        ("max_tokens", [0, -5, 1.5, True, "9"], "a whole number from 1"),
        ("max_completion_tokens", [0, -5, 1.5, False, "9"], "a whole number from 1"),
        ("seed", [2**63, -(2**63) - 1, 10**30, 0.5, True, "1"], "a whole number from -2^63 to 2^63 - 1"),
        ("stop", ["", [""], ["x"] * 17, ["x"] * 100, [1], 5, {"a": 1}, [["x"]], True], "up to 16 texts"),
        ("stream", ["true", 1, 0, "false", []], "true or false"),
        ("logprobs", [1, "true", 5], "true or false"),
        ("top_logprobs", [-1, 21, 1.5, True, "3"], "a whole number from 0 to 20"),
        ("ignore_eos", [1, "yes"], "true or false"),
        (
            "logit_bias",
            [
                {"1": 100.1},
                {"1": -1e300},
                {"x": 1},
                {"-1": 1},
                {"1.0": 1},
                {" 1": 1},
                {"01": 1},
                {"+1": 1},
                {"٣": 1},
                {"": 1},
                {"9" * 400: 1},
                {"1": True},
                {"1": "5"},
                {"1": None, "2": [1]},
                [1],
                "x",
                5,
                {str(token): 1 for token in range(1025)},
            ],
            "token ids",
        ),
    ],
)
def test_a_value_out_of_range_or_of_another_type_names_field_and_range(field, values, range_words):
    for value in values:
        error = refused(**{field: value, "logprobs": True} if field == "top_logprobs" else {field: value})
        assert error.param is not None and error.param.split(".")[0] == field, (value, error.param)
        assert field in error.message and range_words in error.message, (value, error.message)


def test_the_ends_of_the_ranges_are_taken():
    given = {"temperature": 2, "top_p": 1, "presence_penalty": -2, "seed": -(2**63), "top_k": -1, "n": 4}
    given |= {"repetition_penalty": 0.01, "logit_bias": {"0": -100, "31999": 100}, "stop": ["x"] * 16}
    assert parsed(**given).body == {"model": "m", "messages": [USER], **given}
    assert parsed(temperature=0, seed=2**63 - 1).body["seed"] == 2**63 - 1
    assert parsed(max_tokens=5.0, stop="x").body["max_tokens"] == 5
    # The engine would take -1 for no seed at all.
    assert parsed(seed=-1).body["seed"] == parsed(seed=-1).body["seed"] != -1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"stream_options": {"includeusage": True}, "stream": True}, "stream_options.includeusage"),
        ({"stream_options": True, "stream": True}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": None}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"schema": {}}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 501}, "max_tokens"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [None]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "User", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}, USER]}, "messages.1.tool_calls"),
        ({"messages": [USER, {"role": "assistant", "audio": {"id": "1"}}, USER]}, "messages.1.audio"),
        ({"messages": [USER, {"role": "assistant", "refusal": 5}, USER]}, "messages.1.refusal"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "messages.1.role"),
        ({"messages": [{"role": "assistant", "content": "x"}, USER]}, "messages.0.role"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": "x", "a\nb": 1}]}, "'messages.0.a\\nb'"),
        ({"a\nb": 1}, "'a\\nb'"),
        ({"a[0]": 1}, "a[0]"),
        ({"": 1}, "''"),
        ({"x" * 5000: 1}, None),
    ],
)
def test_what_is_wrong_is_named(given, param):
    error = refused(**given)
    assert param is None or error.param == param
    assert str(error.param) in error.message
    assert not {"instance", "dictionary", "validation", "Input", "None"} & set(error.message.split())


def test_a_developer_is_a_system_and_several_become_one():
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    assert messages(developer, USER) == [{"role": "system", "content": "Be kind."}, USER]
    assert messages(system, developer, USER) == [{"role": "system", "content": "Be brief.\n\nBe kind."}, USER]
    assert messages({"role": "system", "content": ""}, developer, USER)[0]["content"] == "Be kind."
    assert messages({"role": "system", "content": ""}, USER) == [USER]
    assert parsed(messages=[{"role": "system", "content": ""}, USER], janus={"preferences": ["Be warm"]}).system


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        (ChatCompletionMessage(role="assistant", content="Hi.").model_dump(), "Hi."),
        (ChatCompletionMessage(role="assistant", content="Hi.", annotations=[], tool_calls=[]).model_dump(), "Hi."),
        (ChatCompletionMessage(role="assistant", content=None).model_dump(), ""),
        (ChatCompletionMessage(role="assistant", refusal="I cannot.").model_dump(), "I cannot."),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": "Hi.", "reasoning_content": "Hm.", "parsed": None}, "Hi."),
        ({"role": "assistant", "content": "Hi.", "reasoning_details": [{}], "thinking_blocks": []}, "Hi."),
        ({"role": "assistant", "content": "Hi.", "provider_specific_fields": {"refusal": None}}, "Hi."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "assistant", "content": "Hi.", "name": "bot", "tool_call_id": None}, "Hi."),
    ],
)
def test_an_assistants_turn_as_clients_send_it_back_is_its_text(turn, text):
    assert messages(USER, turn, USER) == [USER, {"role": "assistant", "content": text}, USER]


def test_text_parts_may_bring_other_keys_and_become_one_text():
    parts = [{"type": "text", "text": "Hel", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "lo?"}]
    assert messages({"role": "user", "content": parts, "name": "me"}) == [USER]
    raw = b'{"model": "m", "messages": [{"role": "user", "content": "ok \\ud83d"}]}'
    assert parse_chat(raw, RECIPE).body["messages"] == [{"role": "user", "content": "ok \ufffd"}]


def test_a_schema_reaches_the_engine_as_it_came():
    schema = {"type": "object", "properties": {"schema": {"enum": [None, 1]}, "x": {"default": None}}}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": None}}
    assert parsed(response_format=given).body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema},
    }
    assert parsed(response_format={"type": "json_object"}).body["response_format"] == {"type": "json_object"}


def test_a_preview_of_nothing_known_is_refused():
    assert "Be warm." in parse_preview(b'{"preferences": ["Be warm", {"dimension": "style", "description": "Short"}]}')
    for raw in (b"", b"[]", b"{}", b'{"preferences": [null]}', b'{"preferences": ["x"], "model": "m"}'):
        with pytest.raises(ApiError) as caught:
            parse_preview(raw)
        assert caught.value.status == 400


TO_ENGINE = {
    "model": str,
    "messages": list,
    "max_tokens": int,
    "max_completion_tokens": int,
    "temperature": float,
    "top_p": float,
    "n": int,
    "stop": list,
    "stream": bool,
    "stream_options": dict,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logit_bias": dict,
    "logprobs": bool,
    "top_logprobs": int,
    "seed": int,
    "response_format": dict,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "ignore_eos": bool,
}
_texts = st.text(st.characters(), max_size=8) | st.sampled_from(["system", "user", "assistant", "developer", "text"])
_numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 2**63, -1, 1e-320])
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_parts = st.fixed_dictionaries({"type": _texts}, optional={"text": _values, "refusal": _values, "extra": _values})
_message = st.fixed_dictionaries(
    {"role": _texts},
    optional={"content": _values | st.lists(_parts, max_size=2), "tool_calls": _values, "x\n": _values},
)
_good = st.lists(st.sampled_from([USER, {"role": "assistant", "content": None}, {"role": "system", "content": "s"}]))
_names = st.sampled_from([*TO_ENGINE, *OPENAI_FIELDS, "janus"]) | _texts


@settings(max_examples=300, deadline=None)
@given(
    extra=st.dictionaries(_names, _values, max_size=3),
    turns=_good | st.lists(_message | _values, max_size=3),
    chops=st.booleans(),
)
def test_a_hostile_body_is_refused_in_one_line_or_becomes_what_the_engine_may_have(extra, turns, chops):
    raw = json.dumps({"model": "m", "messages": turns, **extra}).encode()
    try:
        body = parse_chat(raw[: len(raw) // 2] if chops else raw, RECIPE).body
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.message.isprintable() and 0 < len(error.message) < 1000
        return
    assert set(body) <= set(TO_ENGINE)
    for name, value in body.items():
        assert type(value) is TO_ENGINE[name] or (TO_ENGINE[name] is float and type(value) is int), (name, value)
        assert not isinstance(value, float) or math.isfinite(value)
    assert body["messages"][-1]["role"] == "user"
    for message in body["messages"]:
        assert sorted(message) == ["content", "role"] and message["role"] in ("system", "user", "assistant")
        message["content"].encode()
