"""Where requests come in: Serve's HTTP proxies, on nodes of the cluster that need not be the driver's."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from janus_ray.env import is_loopback, open_directly
from janus_ray.errors import ConfigError
from janus_ray.serve.private_ray import serve_http
from janus_ray.serve.recipe import ServeRecipe

# A worker process may have to start on the other node first, on a machine that is busy.
_ON_NODE_S = 120.0
_HEALTH_S = 5.0
# What a head node has, and no other.
_HEAD = "node:__internal_head__"
_HEALTHY = "HEALTHY"
_EVERY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Entrance:
    """One proxy: where it listens, and whether this process runs beside it."""

    node_id: str
    url: str
    """As it is reached from here; from its own node where only that can reach it."""
    address: str
    """The node's."""
    is_here: bool
    reaches: bool
    """Whether other nodes can reach it."""

    def __str__(self) -> str:
        return self.url if self.reaches or self.is_here else f"{self.url} on node {self.address}"


def base_url(host: str, port: int, node: str = "127.0.0.1") -> str:
    """Where a server that listens on a host can be reached.

    Args:
        host: as it was told to listen, perhaps on every address.
        port: its port.
        node: an address of its machine that the caller can reach.
    """
    if host in _EVERY_ADDRESS:
        host = node
    bracketed = f"[{host}]" if ":" in host.partition("%")[0] and not host.startswith("[") else host
    return f"http://{bracketed}:{port}"


def port_trouble(host: str, port: int) -> str | None:
    """Why nobody can listen there on this machine; None where it is free."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def check_port(recipe: ServeRecipe) -> None:
    """Checks this machine's port, for a cluster that is yet to be started here.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
    """
    if trouble := port_trouble(recipe.host, recipe.port):
        raise _taken(recipe, trouble)


def check_cluster_ports(recipe: ServeRecipe) -> None:
    """Checks, on a cluster that is up, that the proxies can listen where the recipe says.

    Raises:
        ConfigError: a node's port is taken, or Serve runs there already and listens elsewhere.
    """
    running = serve_http()
    if running is not None:
        # It keeps its options as long as it runs, and passes over others in silence.
        if (running.host, running.port) != (recipe.host, recipe.port):
            raise ConfigError(
                f"Serve runs on this cluster already and listens on {running.host}:{running.port}, not on "
                f"{recipe.host}:{recipe.port}; take the same with --set host=... --set port=..., or end it with "
                "`serve shutdown`"
            )
        return
    for node in _nodes():
        if recipe.proxy_location == "EveryNode" or _HEAD in node["Resources"]:
            trouble = on_node(node["NodeID"], port_trouble, recipe.host, recipe.port)
            if trouble:
                raise _taken(recipe, trouble, f" of node {node['NodeManagerAddress']}")


def _taken(recipe: ServeRecipe, trouble: str, where: str = "") -> ConfigError:
    return ConfigError(f"port {recipe.port} on {recipe.host}{where}: {trouble}; choose another with --set port=N")


def entrances(recipe: ServeRecipe) -> list[Entrance]:
    """The proxies that are up, this node's first."""
    import ray
    from ray import serve

    here = ray.get_runtime_context().get_node_id()
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
    up = [node_id for node_id, status in serve.status().proxies.items() if status == _HEALTHY and node_id in addresses]
    found = []
    for node_id in sorted(up, key=lambda node_id: (node_id != here, addresses[node_id])):
        address, is_here = addresses[node_id], node_id == here
        url = base_url(recipe.host, recipe.port, "127.0.0.1" if is_here else address)
        everywhere = recipe.host in _EVERY_ADDRESS
        found.append(Entrance(node_id, url, address, is_here, everywhere or not is_loopback(url)))
    return found


def answer_health(recipe: ServeRecipe) -> list[Entrance] | None:
    """The proxies, once there are any and behind each of them every model can answer; None before."""
    from ray.exceptions import RayError

    found = entrances(recipe)
    try:
        ready = bool(found) and all(_asked_from(entrance)(healthy, entrance.url) for entrance in found)
    except RayError:
        # The node went away meanwhile.
        ready = False
    return found if ready else None


def _asked_from(entrance: Entrance) -> Callable[..., Any]:
    """How to call a function where the entrance can be reached."""
    if entrance.is_here or entrance.reaches:
        return lambda function, *arguments: function(*arguments)
    return lambda function, *arguments: on_node(entrance.node_id, function, *arguments)


def healthy(url: str) -> bool:
    """Whether the server says that every model can answer."""
    try:
        with open_directly(f"{url}/health", _HEALTH_S) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False


def on_node(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function on one node of the cluster; directly where that is this one.

    Raises:
        RayError: the node has gone, or has not answered in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node_id == ray.get_runtime_context().get_node_id():
        return function(*arguments)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # The type checker knows fewer scheduling strategies than Ray.
    remote: Any = ray.remote
    task = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
    return ray.get(task.remote(*arguments), timeout=_ON_NODE_S)


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
