from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from janus_ray.data.annotate import Annotator, preference_sets_type
from janus_ray.data.recipe import CollectRecipe
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.records import DIMENSIONS, Instruction
from tests.loopback import Reply, chat_reply, loopback

INSTRUCTION = Instruction("p1", "main", "original", "How do I start?")


def person(index):
    return {
        dimension: {"subdimension": "s", "preference": f"p{index}", "description": f"{dimension} {index}."}
        for dimension in DIMENSIONS
    }


def teacher(fail_stage=None, fail_if=lambda body: True):
    def answer(n, body):
        text = body["messages"][-1]["content"]
        stage = "sets" if "response_format" in body else "system" if text.startswith("Write the system") else "response"
        if stage == fail_stage and fail_if(body):
            return Reply({"error": {"message": "no"}}, 400)
        if stage == "sets":
            return chat_reply(json.dumps({"preference_sets": [person(i) for i in range(3)]}))
        if stage == "system":
            return chat_reply("S: " + " ".join(line[2:] for line in text.splitlines() if line.startswith("- ")))
        return chat_reply(f"R[{body['messages'][0]['content']}]")

    return answer


async def annotate(server, **fields):
    endpoint = Endpoint(base_url=server.url, model="m", **fields)
    recipe = CollectRecipe.model_validate(
        {"sources": [{"path": "x"}], "output_dir": "y", "teacher": endpoint.model_dump()}
    )
    client = ChatClient(endpoint)
    try:
        return await Annotator(client, recipe).rows(INSTRUCTION)
    finally:
        await client.close()


async def test_one_instruction_becomes_three_rows_that_hang_together():
    with loopback(teacher()) as server:
        rows = await annotate(server)
    assert [row["set_index"] for row in rows] == [0, 1, 2]
    assert len({row["row_id"] for row in rows}) == 3
    for index, row in enumerate(rows):
        assert (row["status"], row["prompt"], row["main_source"]) == ("ok", "How do I start?", "main")
        assert [p["dimension"] for p in row["preference_set"]] == list(DIMENSIONS)
        assert row["system"] == "S: " + " ".join(f"{dimension} {index}." for dimension in DIMENSIONS)
        assert row["output"] == f"R[{row['system']}]"
    # One request for the sets, then two for each row; the shared one is booked once.
    assert sum(row["sent"] for row in rows) == len(server.requests) == 7
    assert [row["sent"] for row in rows] == [3, 2, 2]
    assert sum(row["prompt_tokens"] for row in rows) == 7 * 3
    seeds = [body["seed"] for body in server.requests]
    assert len(set(seeds)) == 7


async def test_failed_preference_sets_are_three_failed_rows():
    with loopback(teacher("sets")) as server:
        rows = await annotate(server)
    assert [(row["status"], row["error_kind"], row["output"]) for row in rows] == [("error", "bad_request", "")] * 3
    assert len(server.requests) == sum(row["sent"] for row in rows) == 1


async def test_a_failed_response_keeps_what_was_obtained_before_it():
    with loopback(teacher("response", lambda body: "style 1." in body["messages"][0]["content"])) as server:
        rows = await annotate(server)
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["system"].startswith("S: style 1.")
    assert len(rows[1]["preference_set"]) == 4
    assert rows[1]["error_message"] == "HTTP 400: no"


THOUGHTS = "<think>secret: she likes cats</think>"


async def test_thoughts_reach_neither_system_nor_output():
    plain = teacher()

    def thinking(n, body):
        reply = plain(n, body)
        message = reply.body["choices"][0]["message"]
        if n % 2:
            message["reasoning_content"] = THOUGHTS
        else:
            message["content"] = f"{THOUGHTS}\n{message['content']}"
        return reply

    with loopback(thinking) as server:
        rows = await annotate(server)
    assert len(server.requests) == 7
    for index, row in enumerate(rows):
        assert row["status"] == "ok"
        assert row["system"] == "S: " + " ".join(f"{dimension} {index}." for dimension in DIMENSIONS)
        assert row["output"] == f"R[{row['system']}]"
        assert "secret" not in json.dumps(server.requests) + json.dumps(row)


@pytest.mark.parametrize(
    ("finish_reason", "message", "kind"),
    [
        ("length", {"content": "half an ans"}, "truncated"),
        ("length", {"content": None, "reasoning": "hm"}, "truncated"),
        (None, {"content": "half an ans"}, "unfinished"),
        ("tool_calls", {"content": "Let me look", "tool_calls": [{"id": "1"}]}, "unfinished"),
        ("error", {"content": "half an ans"}, "server"),
        ("abort", {"content": "half an ans"}, "server"),
        ("stop", {"content": "<think>half a thought"}, "unfinished"),
        ("content_filter", {"content": "half an ans"}, "content_filter"),
    ],
)
async def test_what_is_no_finished_response_is_a_failed_row_with_its_reason(finish_reason, message, kind):
    plain = teacher()

    def answer(n, body):
        is_response = "response_format" not in body and body["messages"][0]["role"] == "system"
        choice = {"finish_reason": finish_reason, "message": message}
        return chat_reply("", choices=[choice]) if is_response else plain(n, body)

    with loopback(answer) as server:
        rows = await annotate(server, max_attempts=1)
    for row in rows:
        assert (row["status"], row["error_kind"], row["output"]) == ("error", kind, "")
        assert row["error_message"]
        assert row["system"].startswith("S: ")
    # The attempts of all three stages, those for more room too.
    assert sum(row["attempts"] for row in rows) == sum(row["sent"] for row in rows) == len(server.requests)


def test_a_value_that_says_nothing_is_none():
    people = [person(index) for index in range(3)]
    people[1]["style"]["description"] = " \u200b"
    with pytest.raises(ValidationError, match="is blank"):
        preference_sets_type(3).model_validate({"preference_sets": people})


def test_the_answer_type_demands_three_people_who_differ():
    three = preference_sets_type(3)
    three.model_validate({"preference_sets": [person(i) for i in range(3)]})
    assert three.model_json_schema()["properties"]["preference_sets"]["minItems"] == 3
    for wrong in ([person(0), person(1)], [person(0), person(1), person(1)], [person(0), person(1), {"style": {}}]):
        with pytest.raises(ValidationError):
            three.model_validate({"preference_sets": wrong})
