"""Starting the application from a job: checks first, then Ray, then wait until every model has answered."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.env import log_level, ray_address
from janus_ray.errors import ConfigError
from janus_ray.model_folder import check_model_folder
from janus_ray.progress import ProgressLine, duration
from janus_ray.serve.causes import cause
from janus_ray.serve.ingress import Entrance, answer_health, base_url, check_cluster_ports, check_port
from janus_ray.serve.private_ray import logs_folder
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.store.hub import model_folder

_POLL_S = 0.5
_PROGRESS_S = 10.0
_DRAIN_CALL_S = 10.0
_DRAIN_POLL_S = 0.2
_DRAIN_ATTEMPTS = 10
_WATCH_S = 5.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
# Tells this job's application from that of another job on the same cluster.
_OWNER = uuid.uuid4().hex


def serve_until_stopped(recipe: ServeRecipe) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ConfigError: the port is taken, the cluster is too small, or a model does not start; with the cause.
        CheckpointError: a model folder is missing, or was trained with another chat template.
    """
    stop = threading.Event()
    with _signals_set(stop), serving(recipe, stop):
        _say_what_changes(recipe, stop)
        print("serve: stopping", flush=True)


@contextmanager
def serving(recipe: ServeRecipe, stop: threading.Event | None = None) -> Generator[str]:
    """Serves within the block and gives the endpoint's base URL, ready for requests.

    Raises:
        ConfigError, CheckpointError: as `serve_until_stopped`.
    """
    stop = stop or threading.Event()
    began = time.monotonic()
    check_before_start(recipe)
    names = ", ".join(model.model_id for model in recipe.models)
    print(f"serve: starting {names}", flush=True)
    _import_engine_meanwhile()
    purpose = f"serving {len(recipe.models)} model{'s' if len(recipe.models) > 1 else ''} behind the gateway"
    with ray_cluster(recipe.ray, recipe.needed_cpus(), purpose, needed_gpus=recipe.needed_gpus(), ending=stop.is_set):
        # Ray has just put its own handlers in the place of ours.
        _set_signals(stop)
        with deployed(recipe, stop, began) as url:
            yield url


@contextmanager
def deployed(recipe: ServeRecipe, stop: threading.Event, began: float) -> Generator[str]:
    """Has the application up within the block, on the Ray cluster that this process is connected to.

    Gives the endpoint's base URL, as `serving`.

    Args:
        recipe: what to serve.
        stop: when set, waiting for the models ends early.
        began: `time.monotonic()` at the start, for the report and the time limit.

    Raises:
        ConfigError: a model does not start; with the cause.
    """
    # From here on an application runs that was not there before, or not like this.
    _start(recipe)
    try:
        found = _wait_until_ready(recipe, stop, began)
        if found:
            _announce(recipe, found, began)
        yield found[0].url if found else base_url(recipe.host, recipe.port)
        # A second signal ends the wait.
        if found:
            with _signals_set(threading.Event()) as hurry:
                drain(recipe, hurry)
    finally:
        _end()


def check_before_start(recipe: ServeRecipe) -> None:
    """Everything that can be known before Ray starts.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
        CheckpointError: a model folder is missing, or was trained with another chat template.
    """
    if not ray_address():
        # On a cluster that is up, another node's may be the one that counts.
        check_port(recipe)
    for model in recipe.models:
        check_model_folder(model_folder(model.path), model.chat_template)


def _import_engine_meanwhile() -> None:
    """Imports vLLM in a thread; it takes as long as starting Ray and Serve, so the two run side by side."""
    _quiet()
    # First what both threads use, so that neither meets a module that the other has half imported.
    import ray.serve  # noqa: F401

    threading.Thread(target=importlib.import_module, args=["janus_ray.serve.engine"], daemon=True).start()


def _quiet() -> None:
    """Keeps what vLLM and Ray Serve report of themselves off the terminal; the replicas' logs hold it."""
    if log_level() == "DEBUG":
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logging.getLogger("ray.llm").setLevel(logging.ERROR)


def _start(recipe: ServeRecipe) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from janus_ray.serve.app import APP_NAME, application

    _quiet()
    if ray_address():
        check_cluster_ports(recipe)
    serve.start(
        proxy_location=recipe.proxy_location,
        http_options={"host": recipe.host, "port": recipe.port},
        logging_config={"enable_access_log": False},
    )
    if ray_address() and APP_NAME in serve.status().applications:
        print(f"serve: takes the place of the application {APP_NAME!r} that runs on this cluster", flush=True)
    ours = application(recipe, _OWNER)
    _quiet()
    target = serve.RunTarget(ours, name=APP_NAME, logging_config=LoggingConfig(enable_access_log=False))
    serve.run_many([target], wait_for_applications_running=False)


def _wait_until_ready(recipe: ServeRecipe, stop: threading.Event, began: float) -> list[Entrance] | None:
    """Waits until /health says that every model has answered; None when a signal came first."""
    deadline = began + recipe.start_timeout_s
    progress, line = time.monotonic() + _PROGRESS_S, ProgressLine("serve: models up", len(recipe.models))
    while not stop.wait(_POLL_S):
        running, up, states = _state(recipe)
        # An application that this one replaces may answer for a while.
        if running and (found := answer_health(recipe)):
            line.update(len(recipe.models), force=True)
            return found
        now = time.monotonic()
        if now > deadline:
            raise ConfigError(
                f"the models were not ready after {recipe.start_timeout_s:g} s ({states}); logs: {_logs()}"
            )
        if now > progress:
            progress += _PROGRESS_S
            passed = f"{duration(now - began)} so far, at most {duration(deadline - now)} more"
            line.update(up, f"{states}, {passed}", force=True)
    return None


def _state(recipe: ServeRecipe) -> tuple[bool, int, str]:
    """Whether every deployment is up, how many models are, and in words what each is doing.

    Raises:
        ConfigError: one has failed; with the cause.
    """
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return False, 0, "deploying"
    shown = {model.deployment_name: f"model {model.model_id}" for model in recipe.models}
    for name, deployment in application.deployments.items():
        if deployment.status in _FAILED:
            reason = cause(deployment.message)
            raise ConfigError(f"{shown.get(name, name)} did not start: {reason}; logs: {_logs()}")
    if application.status in _FAILED:
        raise ConfigError(f"the application did not start: {cause(application.message)}; logs: {_logs()}")
    up = {name: one.status == "HEALTHY" for name, one in application.deployments.items()}
    words = ", ".join(f"{shown.get(name, name)} {'up' if is_up else 'starting'}" for name, is_up in up.items())
    return application.status == "RUNNING", sum(up.get(name, False) for name in shown), words


def _logs() -> str:
    """Ray's log folder, in words: gateway and models under serve/, their standard error in worker-*.err."""
    import ray

    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return logs_folder() if alone else f"{logs_folder()} of the node in question"


def _announce(recipe: ServeRecipe, found: list[Entrance], began: float) -> None:
    first, *others = found
    print(f"serve: ready after {duration(time.monotonic() - began)}")
    print(f"  page    {first.url}/{'' if first.is_here or first.reaches else f' (on node {first.address} only)'}")
    print(f"  API     {first.url}/v1")
    if others:
        print(f"  also    {', '.join(map(str, others))}")
    print(f"  models  {', '.join(model.model_id for model in recipe.models)}")
    print(f"  logs    {_logs()}", flush=True)


def _say_what_changes(recipe: ServeRecipe, stop: threading.Event) -> None:
    """Prints how many replicas each model has whenever that changes, until the event is set."""
    from ray.exceptions import RayError

    known = running_replicas(recipe)
    while not stop.wait(_WATCH_S):
        try:
            found = running_replicas(recipe)
        except RayError:
            # Serve's controller is being started again; it says more in a moment.
            continue
        for line in replica_news(known, found):
            print(line, flush=True)
        known = found


def replica_news(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """What to say when the number of running replicas of some models has changed."""
    return [
        f"serve: model {model_id}: {now.get(model_id, 0)} replicas up, {number} before"
        for model_id, number in before.items()
        if now.get(model_id, 0) != number
    ]


def running_replicas(recipe: ServeRecipe) -> dict[str, int]:
    """How many replicas of each model are up."""
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    found = application.deployments if application else {}
    states = {name: deployment.replica_states for name, deployment in found.items()}
    return {model.model_id: states.get(model.deployment_name, {}).get("RUNNING", 0) for model in recipe.models}


def drain(recipe: ServeRecipe, hurry: threading.Event | None = None) -> None:
    """Has what is being answered finished while new requests are refused, for as long as a model may drain.

    Args:
        recipe: what is served.
        hurry: when set, the wait ends early.
    """
    hurry = hurry or threading.Event()
    limit_s = max(model.drain_timeout_s for model in recipe.models)
    deadline, said = time.monotonic() + limit_s, 0
    while not hurry.is_set() and time.monotonic() < deadline and (answering := _answering()):
        if answering != said:
            shown = "1 answer is" if answering == 1 else f"{answering} answers are"
            print(f"serve: {shown} being finished (at most {limit_s:g} s)", flush=True)
            said = answering
        hurry.wait(_DRAIN_POLL_S)


def _answering() -> int:
    """Tells every gateway to take no more, and returns how many requests are still being answered."""
    return sum(answering or 0 for answering in _ask_gateways("drain", _OWNER))


def _ask_gateways(method: str, *arguments: str) -> list[Any]:
    """What every gateway answers; nothing where none is up."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

    from janus_ray.serve.app import APP_NAME, GATEWAY_NAME

    application = serve.status().applications.get(APP_NAME)
    gateway = application.deployments.get(GATEWAY_NAME) if application else None
    if gateway is None or not gateway.replica_states.get("RUNNING"):
        return []
    gateways = serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
    for _ in range(_DRAIN_ATTEMPTS):
        try:
            return list(gateways.broadcast(method, *arguments).results(timeout_s=_DRAIN_CALL_S))
        # A handle knows its replicas a moment after it was made.
        except DeploymentUnavailableError:
            time.sleep(_DRAIN_POLL_S)
        except (RayError, RayServeException, TimeoutError):
            break
    return []


def _end() -> None:
    """Takes our application down on a cluster that stays up; a cluster of our own ends with everything on it.

    Not the one of another job, which has taken our place since.
    """
    if ray_address() and all(owner == _OWNER for owner in _ask_gateways("owner")):
        from ray import serve

        from janus_ray.serve.app import APP_NAME

        serve.delete(APP_NAME)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _signals_set(stop: threading.Event) -> Generator[threading.Event]:
    """Within the block SIGINT and SIGTERM set the event, which is given back."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _set_signals(stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_signals(stop: threading.Event) -> None:
    for number in _SIGNALS:
        signal.signal(number, lambda *_: stop.set())
