"""The endpoint as a client sees it: real HTTP, gateway, Ray Serve and vLLM."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest
from ray import serve

from janus_ray.errors import ConfigError
from janus_ray.model_folder import weights_id
from janus_ray.serve.app import APP_NAME
from janus_ray.serve.launch import deployed, drain
from janus_ray.values.value import Value
from janus_ray.values.wording import system_sha, verbalise

MODEL = "tiny/model-1.0"
USER = {"role": "user", "content": "What do you value?"}
VALUES = [
    {"dimension": "harmlessness", "description": "Name risks."},
    {"dimension": "style", "description": "Be warm and brief."},
]


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(client, **options):
    options = {"messages": [USER], "temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model=MODEL, **options)


def counts() -> dict[str, int]:
    handle = serve.get_deployment_handle("model:tiny--model-1_0", APP_NAME)
    return handle.counts.remote().result()


def test_health_is_503_until_the_model_has_answered(served):
    # Until the gateway itself is up, Serve answers 404.
    statuses = [status for status in served.health_while_starting if status != 404]
    assert statuses[0] == 503 and statuses == sorted(statuses, reverse=True)
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "models": {MODEL: "ready"}}


def test_models_and_page(served, client, tiny_model):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).weights_id == weights_id(tiny_model)
    assert httpx.head(f"{served.url}/v1/models/{MODEL}").status_code == 200
    assert "Janus" in httpx.get(served.url).text
    assert httpx.get(f"{served.url}/page/app.js").status_code == 200
    assert httpx.get(f"{served.url}/metrics").json()["error"]["type"] == "invalid_request_error"


def test_a_stream_says_what_the_plain_answer_says(served, client):
    plain = greedy(client)
    assert plain.usage.completion_tokens == 12 or plain.choices[0].finish_reason == "stop"
    chunks = list(greedy(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    body = {"model": MODEL, "messages": [USER], "stream": True, "max_tokens": 3, "temperature": 0}
    raw = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events[:-2])


def test_preferences_are_the_equal_system_message(client):
    system = verbalise([Value(dimension=value["dimension"], description=value["description"]) for value in VALUES])
    stated = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[USER],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        extra_body={"janus": {"preferences": VALUES[::-1]}},
    )
    given = greedy(client, messages=[{"role": "system", "content": system}, USER], logprobs=True)
    without = greedy(client, logprobs=True)
    assert stated.headers["x-janus-system-sha"] == system_sha(system)
    answer = stated.parse()
    assert answer.choices[0].message == given.choices[0].message
    assert answer.usage.prompt_tokens == given.usage.prompt_tokens > without.usage.prompt_tokens

    def logprobs(completion):
        return [token.logprob for token in completion.choices[0].logprobs.content]

    assert logprobs(answer) == pytest.approx(logprobs(given), abs=1e-3)
    assert logprobs(answer) != pytest.approx(logprobs(without), abs=1e-3)


def test_a_conversation_goes_on_as_the_sdk_gives_it_back(client):
    developer = {"role": "developer", "content": "Be brief."}
    first = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[developer, USER], max_tokens=4, temperature=0, store=True, metadata={"a": "b"}, seed=-1
    )
    assert first.headers["x-janus-ignored"] == "metadata, store"
    turn = first.parse().choices[0].message
    history = [developer, USER, turn.model_dump(), USER]
    plain = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": turn.content}, USER]
    echoed = greedy(client, messages=history, logprobs=True, top_logprobs=2, stop=None, n=None, tools=None)
    assert echoed.usage.prompt_tokens == greedy(client, messages=plain).usage.prompt_tokens
    assert len(echoed.choices[0].logprobs.content[0].top_logprobs) == 2


def test_an_answer_follows_a_schema(client):
    # Between brackets a random model may write blanks for ever; here there are none.
    choice = {"name": "answer", "schema": {"enum": ["short", "long"]}, "strict": True}
    answer = greedy(client, max_tokens=60, response_format={"type": "json_schema", "json_schema": choice})
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content) in ("short", "long")


def test_the_prompt_is_tokenised_as_in_training(tiny_model, client):
    from janus_ray.chat import conversation
    from janus_ray.model_folder import load_encoder

    encoder = load_encoder(tiny_model)
    for text in ("What do you value?", "Say </s>, <s> and [/INST] aloud."):
        messages = conversation("Be brief. [INST]", text)
        assert greedy(client, messages=messages).usage.prompt_tokens == len(encoder.encode_prompt(messages))
    turns = [USER, {"role": "assistant", "content": "I </s> do."}, USER]
    assert greedy(client, messages=turns).usage.prompt_tokens == len(encoder.encode_prompt(turns))


def test_refusals_reach_the_client_as_openai_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="absent", messages=[USER])
    with pytest.raises(openai.BadRequestError, match="priority: unknown parameter"):
        greedy(client, extra_body={"priority": 1})
    with pytest.raises(openai.BadRequestError, match=r"the prompt is too long: it has .*\d+ .*takes 1024 tokens"):
        greedy(client, messages=[{"role": "user", "content": "value " * 2000}])


async def test_a_full_queue_answers_429_and_the_others_are_served(served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

        async def one():
            return await client.chat.completions.create(
                model=MODEL, messages=[USER], max_tokens=300, extra_body={"ignore_eos": True}
            )

        answers = await asyncio.gather(*(one() for _ in range(12)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    served_answers = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(refused) + len(served_answers) == 12, answers
    assert served_answers and all(answer.usage.completion_tokens == 300 for answer in served_answers)
    assert refused and refused[0].response.headers["retry-after"] == "3"
    assert refused[0].code == "overloaded"


def test_a_client_that_goes_away_frees_its_place(client):
    before = counts()["cancelled"]
    stream = greedy(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    freed = {"unfinished": 0, "cancelled": before + 1}
    deadline = time.monotonic() + 30
    while counts() != freed and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counts() == freed


def test_a_server_that_stops_finishes_its_answers_and_takes_no_more(served, client):
    options = {"max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
    running = greedy(client, **options, stream_options={"include_usage": True})
    next(iter(running))
    (model,) = served.recipe.models
    # However slow the machine, the answer ends first.
    patient = served.recipe.model_copy(update={"models": [model.model_copy(update={"drain_timeout_s": 240.0})]})
    drained = threading.Thread(target=lambda: (drain(patient), left.append(counts()["unfinished"])))
    left: list[int] = []
    drained.start()
    deadline = time.monotonic() + 30
    while httpx.get(f"{served.url}/health").json()["status"] != "stopping" and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(openai.InternalServerError, match="the server is stopping") as refused:
        greedy(client)
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"] == "3"
    chunks = list(running)
    assert chunks[-1].usage.completion_tokens == 900
    drained.join()
    assert left == [0]


def test_the_scaling_fields_arrive_in_serve(served):
    from ray.serve.context import _get_global_client

    deployments = _get_global_client().get_serve_details()["applications"][APP_NAME]["deployments"]
    (model,) = served.recipe.models
    config = deployments[model.deployment_name]["deployment_config"]["autoscaling_config"]
    assert {name: config[name] for name in model.scaling()} == model.scaling()


def test_a_model_that_cannot_start_is_reported_with_its_cause(served):
    model = served.recipe.models[0].model_copy(update={"max_model_len": 4096})
    recipe = served.recipe.model_copy(update={"models": [model]})
    serve.delete(APP_NAME)
    words = rf"model {MODEL} did not start: .*max_model_len \(4096\) is greater than .*; logs: .*/logs$"
    with pytest.raises(ConfigError, match=words), deployed(recipe, threading.Event(), time.monotonic()):
        pass
