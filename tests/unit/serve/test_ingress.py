from types import SimpleNamespace

import pytest
from ray.exceptions import NodeDiedError

from janus_ray.config import validate
from janus_ray.errors import ConfigError
from janus_ray.serve import ingress
from janus_ray.serve.recipe import ServeRecipe

HEAD = {"NodeID": "h", "NodeManagerAddress": "10.0.0.1", "Resources": {"node:__internal_head__": 1.0}}
WORKER = {"NodeID": "w", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4.0}}


def recipe(**fields) -> ServeRecipe:
    return validate(ServeRecipe, {"models": [{"model_id": "m", "path": "/m"}], "port": 8000, **fields}, "test")


@pytest.fixture
def cluster(monkeypatch):
    """A head, and a worker on which this process runs; what is asked of a node is written down, and answered."""
    asked: list[tuple[str, str]] = []
    state = SimpleNamespace(asked=asked, answers={}, proxies={"h": "HEALTHY"}, here="w")

    def on_node(node_id, function, *arguments):
        asked.append((node_id, function.__name__))
        answer = state.answers.get(node_id)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: state.here))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(proxies=state.proxies))
    monkeypatch.setattr(ingress, "_nodes", lambda: [HEAD, WORKER])
    monkeypatch.setattr(ingress, "on_node", on_node)
    monkeypatch.setattr(ingress, "serve_http", lambda: None)
    return state


def test_the_port_that_counts_is_that_of_the_nodes_with_a_proxy(cluster):
    ingress.check_cluster_ports(recipe())
    assert cluster.asked == [("h", "port_trouble")]
    ingress.check_cluster_ports(recipe(proxy_location="EveryNode"))
    assert cluster.asked[1:] == [("h", "port_trouble"), ("w", "port_trouble")]
    cluster.answers["h"] = "address already in use"
    with pytest.raises(ConfigError, match=r"port 8000 on 127\.0\.0\.1 of node 10\.0\.0\.1: address already in use"):
        ingress.check_cluster_ports(recipe())


def test_a_serve_that_runs_already_keeps_its_address(cluster, monkeypatch):
    monkeypatch.setattr(ingress, "serve_http", lambda: SimpleNamespace(host="0.0.0.0", port=8000))
    with pytest.raises(ConfigError, match=r"listens on 0\.0\.0\.0:8000, not on 127\.0\.0\.1:8000.*serve shutdown"):
        ingress.check_cluster_ports(recipe())
    # Its own proxy holds the port, so nobody asks whether it is free.
    ingress.check_cluster_ports(recipe(host="0.0.0.0"))
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("host", "here", "url", "shown", "asked"),
    [
        ("127.0.0.1", "w", "http://127.0.0.1:8000", "http://127.0.0.1:8000 on node 10.0.0.1", [("h", "healthy")]),
        ("0.0.0.0", "w", "http://10.0.0.1:8000", "http://10.0.0.1:8000", []),
        ("0.0.0.0", "h", "http://127.0.0.1:8000", "http://127.0.0.1:8000", []),
        ("10.0.0.1", "w", "http://10.0.0.1:8000", "http://10.0.0.1:8000", []),
    ],
)
def test_a_proxy_is_asked_where_it_can_be_reached(cluster, monkeypatch, host, here, url, shown, asked):
    reached = []
    monkeypatch.setattr(ingress, "open_directly", lambda url, timeout_s: reached.append(url) or _Answer())
    cluster.here, cluster.answers["h"] = here, True
    (found,) = ingress.answer_health(recipe(host=host))
    assert (found.url, str(found), cluster.asked) == (url, shown, asked)
    assert reached == ([] if asked else [f"{url}/health"])


class _Answer:
    status = 200

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_readiness_waits_for_every_proxy_and_survives_a_node_that_dies(cluster):
    cluster.proxies = {"h": "STARTING", "gone": "HEALTHY"}
    assert ingress.answer_health(recipe()) is None
    cluster.proxies = {"h": "HEALTHY"}
    for answer in (False, NodeDiedError("gone")):
        cluster.answers["h"] = answer
        assert ingress.answer_health(recipe()) is None
    cluster.answers["h"] = True
    assert ingress.answer_health(recipe()) is not None
    # This node's comes first: it is what a person opens.
    cluster.proxies = {"h": "HEALTHY", "w": "HEALTHY"}
    cluster.answers["w"] = True
    cluster.here = "w"
    found = ingress.entrances(recipe(host="0.0.0.0", proxy_location="EveryNode"))
    assert [entrance.node_id for entrance in found] == ["w", "h"]
