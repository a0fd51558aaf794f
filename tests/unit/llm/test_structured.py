from __future__ import annotations

from pydantic import BaseModel

from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import LLMRequest
from janus_ray.llm.structured import complete_structured
from tests.loopback import chat_reply, loopback


class Answer(BaseModel):
    number: int


async def ask(server, max_reasks=2):
    client = ChatClient(Endpoint(base_url=server.url, model="m"))
    request = LLMRequest("stage", ({"role": "user", "content": "a number"},))
    try:
        return await complete_structured(client, request, Answer, max_reasks)
    finally:
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
