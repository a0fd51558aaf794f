"""The endpoint section of a recipe, and what tells one endpoint's answers from another's."""

from __future__ import annotations

import asyncio
import socket

import pytest

from janus_ray.config import load_recipe, validate
from janus_ray.env import is_loopback, open_directly
from janus_ray.errors import ConfigError
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.client import ChatClient
from janus_ray.llm.endpoint import Endpoint, ReachedEndpoint
from janus_ray.llm.ledger import Ledger
from janus_ray.llm.request import LLMRequest
from tests.loopback import Reply, chat_reply, loopback

HI = LLMRequest("test", ({"role": "user", "content": "hi"},))


@pytest.mark.parametrize(
    "fields",
    [
        {"served_at": "http://h/v1"},
        {"weights_id": "x"},
        {"model": ""},
        {"model": " "},
        {"model": "m\n"},
        {"model": True},
        {"base_url": ""},
        {"base_url": "miniature"},
        {"provider": "janus"},
        {"base_url": "localhost:8000/v1"},
        {"base_url": "ftp://h/v1"},
        {"base_url": "http://h:0/v1"},
        {"base_url": "http://h:99999/v1"},
        {"base_url": "http://h/v1#part"},
        {"base_url": "http://h/v1 http://g/v1"},
        {"base_url": "http://h\\v1"},
        {"base_url": "http://h/v1/chat/completions"},
        {"omit": ["messages"]},
        {"max_tokens_field": "max_new_tokens"},
        {"timeout_s": float("inf")},
        {"timeout_s": float("nan")},
        {"max_wait_s": float("inf")},
        {"give_up_after_s": float("nan")},
    ],
)
def test_what_cannot_be_an_endpoint_is_refused_in_one_line(fields):
    with pytest.raises(ConfigError) as refused:
        validate(Endpoint, {"base_url": "http://h/v1", "model": "m"} | fields, "recipe")
    assert next(iter(fields)) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_job_finds_out_is_not_offered_to_people(tmp_path):
    (tmp_path / "r.toml").write_text('base_url = "http://h/v1"\nmodel = "m"\nserved_at = "http://g/v1"\n')
    with pytest.raises(ConfigError, match="served_at: unknown key; allowed: provider, base_url") as refused:
        load_recipe(Endpoint, [tmp_path / "r.toml"])
    assert "weights_id" not in str(refused.value)


def test_what_is_left_out_is_a_set():
    values = {"base_url": "http://h/v1", "model": "m", "omit": ["top_p", "seed", "top_p"]}
    assert validate(Endpoint, values, "recipe").omit == ("seed", "top_p")


@pytest.mark.parametrize("url", ["http://h:8000/v1/", " https://H/v1", "HTTP://[::1]:80/v1"])
def test_addresses_that_are_fine(url):
    assert validate(Endpoint, {"base_url": url, "model": "m"}, "recipe").base_url == url.strip().rstrip("/")


def test_the_identity_holds_the_weights_or_the_host_and_never_the_port():
    one = Endpoint(base_url="http://h:8000/v1", model="m")
    assert one.identity == Endpoint(base_url="https://H:9000/v1/", model="m").identity
    assert one.identity != Endpoint(base_url="http://g:8000/v1", model="m").identity
    assert one.identity != Endpoint(base_url="http://h:8000/other/v1", model="m").identity
    known = one.reached(weights_id="a")
    assert known.identity not in (one.identity, one.reached(weights_id="b").identity)
    assert known.identity == Endpoint(base_url="http://g:1/v1", model="m").reached(weights_id="a").identity
    assert known.url == one.url
    assert ReachedEndpoint.model_validate(known.model_dump(mode="json")) == known


async def test_another_port_is_answered_from_the_ledger_and_other_weights_are_not(tmp_path):
    async def sent(server, weights_id=None):
        endpoint = Endpoint(base_url=server.url, model="m").reached(weights_id=weights_id)
        client = ChatClient(endpoint, Ledger(tmp_path))
        outcome = await client.complete(HI)
        await client.close()
        return outcome.sent

    with loopback(lambda n, body: chat_reply("x")) as one, loopback(lambda n, body: chat_reply("x")) as other:
        assert [await sent(one), await sent(other)] == [1, 0]
        assert [await sent(one, "first"), await sent(other, "first"), await sent(one, "retrained")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:1/v1", True),
        ("http://a.localhost/v1", True),
        ("http://127.0.0.1:1/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8/v1", True),
        ("http://[::ffff:127.0.0.1]/v1", True),
        ("http://0.0.0.0:8000", True),
        ("http://10.0.0.1/v1", False),
        ("http://localhost.example.org/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_what_is_on_this_machine(url, here):
    assert is_loopback(url) == here


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_this_machine_is_reached_whatever_proxy_the_environment_names(monkeypatch, variable):
    with socket.socket() as nobody:
        # Bound and not listening: whoever asks this proxy is refused.
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv(variable, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with loopback(lambda n, body: chat_reply("x")) as server:
            endpoint = Endpoint(base_url=server.url, model="m", max_attempts=1)
            check_endpoint(endpoint, "teacher")
            assert asyncio.run(ChatClient(endpoint).complete(HI)).text == "x"
            with open_directly(f"{server.url}/models", 5) as answer:
                assert answer.status == 200
        elsewhere = Endpoint(base_url="http://model.invalid/v1", model="m")
        with pytest.raises(ConfigError, match="cannot be reached"):
            check_endpoint(elsewhere, "teacher")


def test_a_proxy_is_used_for_what_is_elsewhere(monkeypatch):
    with loopback(lambda n, body: chat_reply("x"), models=Reply({"data": [{"id": "m"}]})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        check_endpoint(Endpoint(base_url="http://model.invalid/v1", model="m"), "teacher")


@pytest.mark.parametrize("proxy", ["nonsense://h:1", "http://h:port", "socks5://h:1"])
def test_a_proxy_that_is_none_is_one_line(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    elsewhere = Endpoint(base_url="http://model.invalid/v1", model="m", max_attempts=1)
    with pytest.raises(ConfigError) as refused:
        check_endpoint(elsewhere, "teacher")
    assert "\n" not in str(refused.value)
