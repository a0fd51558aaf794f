from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import LLMRequest
from janus_ray.llm.structured import Unfit, complete_structured, read_structured
from tests.loopback import Reply, chat_reply, loopback


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)

    number: int


class Named(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


async def ask(server, max_reasks=2, client=None, text="a number"):
    given, client = client, client or ChatClient(Endpoint(base_url=server.url, model="m"))
    request = LLMRequest("stage", ({"role": "user", "content": text},))
    try:
        return await complete_structured(client, request, Answer, max_reasks)
    finally:
        if given is None:
            await client.close()


async def test_a_wrong_answer_is_asked_again_with_its_error():
    replies = ["not json", '{"number": "many"}', '{"number": 4}']
    with loopback(lambda n, body: chat_reply(replies[n])) as server:
        answer, outcome = await ask(server)
    assert answer == Answer(number=4)
    assert (outcome.status, outcome.attempts, outcome.sent, outcome.usage.completion_tokens) == ("ok", 3, 3, 6)
    last = server.requests[-1]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[3]["content"] == '{"number": "many"}'
    assert "number: Input should be a valid integer" in last[4]["content"]


async def test_a_rerun_goes_on_where_the_asking_gave_up(tmp_path):
    """Answers that never fitted are in the ledger: they are not paid for again, and do not end the rerun either."""
    with loopback(lambda n, body: chat_reply("never" if n < 2 else '{"number": 4}')) as server:
        for expected in ((None, 2), (Answer(number=4), 1), (Answer(number=4), 0)):
            client = ChatClient(Endpoint(base_url=server.url, model="m"), Ledger(tmp_path))
            request = LLMRequest("stage", ({"role": "user", "content": "a number"},))
            answer, outcome = await complete_structured(client, request, Answer, max_reasks=1)
            await client.close()
            assert (answer, outcome.sent) == expected


async def test_asking_again_is_bounded():
    with loopback(lambda n, body: chat_reply("never")) as server:
        answer, outcome = await ask(server, max_reasks=1)
    assert (answer, outcome.error_kind, len(server.requests), outcome.sent) == (None, "schema_invalid", 2, 2)


FORMS = [
    '{"number": 4}',
    '\ufeff{"number": 4}',
    '<think>maybe {"number": 5}?</think>\n{"number": 4}',
    'maybe {"number": 5}</think>{"number": 4}',
    '```json\n{"number": 4}\n```',
    '```json{"number": 4}```',
    '```\n{"number": 4}\n```',
    '```JSON5 title="x"\n{"number": 4}\n```\nDone.',
    '~~~\n{"number": 4}\n~~~',
    'Here you are:\n{"number": 4}',
    'Here you are: {"number": 4} I hope that helps {you}!',
    'Fill in {placeholders} as {so}: {"number": 4}',
    '{"number": 4}{"number": 4}',
    'A sketch {"number": "many"}, and the answer {"number": 4}',
    '"{\\"number\\": 4}"',
    '[{"number": 4}]',
]


async def test_good_json_is_read_whatever_stands_around_it_and_no_reask_is_paid():
    with loopback(lambda n, body: chat_reply(FORMS[n])) as server:
        for number, text in enumerate(FORMS):
            answer, outcome = await ask(server)
            assert (answer, outcome.status, len(server.requests)) == (Answer(number=4), "ok", number + 1), text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"number": 4} or {"number": 5}', "more than one"),
        ('{"wrapper": {"number": 4}}', "number: Field required"),
        ('{"wrapper": {"number": 4}', "no JSON object"),
        ('{"wrapper": {"number": 4}, "x"', "no JSON object"),
        ('{"number": 4, "number": 5}', "no JSON object"),
        ('{"number": NaN}', "no JSON object"),
        ('{"number": ' + "9" * 5000 + "}", "no JSON object"),
        ('{"number":' * 50_000, "no JSON object"),
        ("{" * 50_000, "no JSON object"),
        ("number: 4", "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_what_could_be_misread_is_not_read(text, problem):
    with pytest.raises(Unfit, match=problem):
        read_structured(text, Answer)


@given(
    st.lists(st.sampled_from([*FORMS, "{", "}", '"', "\\", "<think>", "4", "[", '{"number": 5}']) | st.text(max_size=5))
)
@settings(deadline=None)
def test_any_text_is_read_or_refused(parts):
    text = "".join(parts)
    try:
        answer = read_structured(text, Answer)
    except Unfit as refused:
        assert str(refused)
    else:
        assert str(answer.number) in text


def test_half_a_surrogate_escaped_inside_the_json_is_replaced():
    assert read_structured('{"name": "ok \\ud83d"}', Named).name == "ok \ufffd"
    assert read_structured('{"name": "\\ud83d\\ude00"}', Named).name == "\U0001f600"


def refusing(accepted):
    """An endpoint that takes only some forms of JSON, and says so as OpenAI does."""

    def answer(n, body):
        asked = body.get("response_format", {"type": "none"})["type"]
        if asked not in accepted:
            message = f"Invalid parameter: 'response_format' of type '{asked}' is not supported with this model."
            return Reply({"error": {"message": message, "param": "response_format"}}, 400)
        return chat_reply('{"number": 4}')

    return answer


@pytest.mark.parametrize(
    ("accepted", "asked"),
    [
        (("json_schema",), ["json_schema", "json_schema"]),
        (("json_object",), ["json_schema", "json_object", "json_object"]),
        (("none",), ["json_schema", "json_object", "none", "none"]),
    ],
)
async def test_the_response_format_is_found_once_and_said_in_one_line(accepted, asked, capsys):
    with loopback(refusing(accepted)) as server:
        client = ChatClient(Endpoint(base_url=server.url, model="m"))
        for text in ("one", "two"):
            request = LLMRequest("stage", ({"role": "user", "content": text},))
            answer, outcome = await complete_structured(client, request, Answer)
            assert (answer, outcome.status) == (Answer(number=4), "ok")
        await client.close()
    forms = [body.get("response_format", {"type": "none"})["type"] for body in server.requests]
    assert forms == asked
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(client.take_notices()) == (accepted != ("json_schema",))
    # Where no schema goes out beside the prompt, it stands in it.
    last = server.requests[-1]["messages"][0]["content"]
    assert (json.dumps(Answer.model_json_schema()) in last) == (accepted != ("json_schema",))


async def test_requests_on_their_way_together_find_the_format_together(capsys):
    with loopback(refusing(("none",))) as server:
        client = ChatClient(Endpoint(base_url=server.url, model="m"))
        answers = await asyncio.gather(*(ask(server, client=client, text=str(n)) for n in range(5)))
        await client.close()
    assert {answer for answer, _ in answers} == {Answer(number=4)}
    assert len(server.requests) <= 15
    assert capsys.readouterr().out.count("\n") == 1


async def test_a_400_for_another_reason_changes_no_format_and_a_second_refusal_is_final():
    with loopback(lambda n, body: Reply({"error": {"message": "prompt is too long"}}, 400)) as server:
        answer, outcome = await ask(server)
    assert (answer, outcome.error_kind, len(server.requests)) == (None, "bad_request", 1)
    with loopback(refusing(())) as server:
        answer, outcome = await ask(server)
    assert (answer, outcome.error_kind, len(server.requests)) == (None, "bad_request", 3)


async def test_the_key_of_a_request_does_not_depend_on_the_format_that_was_found(tmp_path):
    with loopback(refusing(("none",))) as server:
        for sent in (3, 0):
            client = ChatClient(Endpoint(base_url=server.url, model="m"), Ledger(tmp_path))
            _, outcome = await ask(server, client=client)
            assert outcome.sent == sent
            await client.close()
