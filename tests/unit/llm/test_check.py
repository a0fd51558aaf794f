"""What is found out about an endpoint before any work starts."""

from __future__ import annotations

import pytest

from janus_ray.errors import ConfigError
from janus_ray.llm.check import check_endpoint, listed_models
from janus_ray.llm.endpoint import Endpoint
from tests.loopback import Reply, chat_reply, loopback

NO_SUCH_MODEL = Reply({"error": {"message": "The model does not exist", "code": "model_not_found"}}, 404)


def endpoint_at(server, model="m", **fields):
    return Endpoint(base_url=server.url, model=model, **fields)


def test_a_listed_model_costs_no_request_and_a_misspelt_one_is_refused():
    with loopback(lambda n, body: NO_SUCH_MODEL, models=("a", "b")) as server:
        check_endpoint(endpoint_at(server, "a"), "teacher")
        assert server.requests == []
        with pytest.raises(ConfigError, match=r"teacher: .* has no model 'm'; it has: a, b .*does not exist"):
            check_endpoint(endpoint_at(server), "teacher")
    assert [body["model"] for body in server.requests] == ["m"]


@pytest.mark.parametrize(
    ("name", "models", "warned"),
    [
        ("llama3", ("llama3:latest",), True),
        ("g", Reply({"models": [{"name": "models/g"}]}), True),
        ("x:online", ("x", "y"), True),
        ("m", Reply(["m", 3, None]), False),
        ("m", Reply([{"id": "m"}]), False),
        ("m", Reply({"data": None}), False),
        ("m", Reply({"data": [{"id": 3}, "m"]}), False),
        ("m", Reply("<html>nothing here</html>"), False),
        ("m", Reply("", 404), False),
        ("m", Reply({"detail": "Method Not Allowed"}, 405), False),
        ("m", Reply({"error": "this key may not list models"}, 403), False),
        ("m", (), False),
    ],
)
def test_the_list_of_models_is_no_whitelist(name, models, warned, capsys):
    with loopback(lambda n, body: chat_reply("hi"), models=models) as server:
        assert check_endpoint(endpoint_at(server, name), "teacher") is None
    assert len(server.requests) <= 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == warned
    assert (f"not {name!r}; it answers one request" in printed) == warned


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_is_merely_busy_passes(status):
    with loopback(lambda n, body: NO_SUCH_MODEL, models_status=status) as server:
        check_endpoint(endpoint_at(server), "teacher")
    assert server.requests == []


@pytest.mark.parametrize(
    ("models", "reply", "message"),
    [
        (Reply("", 404), Reply("", 404), r"lists no models and refuses a request to 'm' \(HTTP 404: Not Found\)"),
        (Reply("<p>Hi", 200), Reply("<title>Welcome</title>", 200), r"does not speak the OpenAI protocol .*Welcome"),
        (Reply("", 403), Reply("", 403), r"rejects a request without a key"),
        (Reply("", 404), Reply({"error": {"message": "top up", "code": 402}}), r"top up"),
        (("a",), Reply({"error": {"message": "no m here", "code": 404}}), r"has no model 'm'; it has: a"),
        (("a\nb\x1b",), Reply({"error": {"message": "two\nlines\x1b[2J"}}, 404), r"it has: a b .*two lines"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(models, reply, message):
    with loopback(lambda n, body: reply, models=models) as server, pytest.raises(ConfigError, match=message) as error:
        check_endpoint(endpoint_at(server), "teacher")
    assert str(error.value).isprintable()


def test_a_key_that_is_rejected_and_an_endpoint_that_is_not_there(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "wrong")
    with (
        loopback(lambda n, body: chat_reply("x"), models_status=401) as server,
        pytest.raises(ConfigError, match="rejects the key in SOME_KEY"),
    ):
        check_endpoint(endpoint_at(server, api_key_env="SOME_KEY"), "teacher")
    nowhere = Endpoint(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ConfigError, match="cannot be reached"):
        check_endpoint(nowhere, "teacher")
    with pytest.raises(ConfigError, match="UNSET_KEY, which is not set"):
        check_endpoint(nowhere.model_copy(update={"api_key_env": "UNSET_KEY"}), "teacher")


def test_the_weights_behind_a_name_are_told_where_the_endpoint_tells_them():
    entries = [{"id": "m", "weights_id": "xxh-1"}, {"id": "n", "weights_id": 7}]
    with loopback(lambda n, body: chat_reply("x"), models=Reply({"data": entries})) as server:
        assert check_endpoint(endpoint_at(server), "policy") == "xxh-1"
        assert check_endpoint(endpoint_at(server, "n"), "policy") is None


def test_any_list_is_read_without_a_crash():
    assert listed_models(b'{"data": [{"id": "a\\ud83d"}, {"id": []}, {}, [], 1e999, null]}') == {"a�": None}
    assert listed_models(b'{"data": {"id": "m"}}') is None
    assert listed_models(b"\xff\x00") is None
    assert listed_models(b"[" * 100_000) is None
