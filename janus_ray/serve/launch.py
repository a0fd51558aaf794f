"""Starting the application from a job: checks first, then Ray, then wait until every model has answered."""

from __future__ import annotations

import http.client
import importlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_ray.cluster import ray_cluster
from janus_ray.config import resolved
from janus_ray.env import log_level, open_directly, ray_address
from janus_ray.errors import ConfigError
from janus_ray.model_folder import check_model_folder
from janus_ray.serve.recipe import ServeRecipe
from janus_ray.store.hub import model_folder

_POLL_S = 0.5
_PROGRESS_S = 10.0
_DRAIN_CALL_S = 10.0
_DRAIN_POLL_S = 0.2
_DRAIN_ATTEMPTS = 10
_CAUSE_CHARACTERS = 400
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def serve_until_stopped(recipe: ServeRecipe) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ConfigError: the port is taken, the cluster is too small, or a model does not start; with the cause.
        CheckpointError: a model folder is missing, or was trained with another chat template.
    """
    stop = threading.Event()
    with _signals_set(stop), serving(recipe, stop):
        stop.wait()
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
    with ray_cluster(recipe.ray, recipe.needed_cpus(), purpose, needed_gpus=recipe.needed_gpus()):
        # Ray has just put its own handlers in the place of ours.
        _set_signals(stop)
        with deployed(recipe, stop, began):
            yield base_url(recipe)


@contextmanager
def deployed(recipe: ServeRecipe, stop: threading.Event, began: float) -> Generator[None]:
    """Has the application up within the block, on the Ray cluster that this process is connected to.

    Args:
        recipe: what to serve.
        stop: when set, waiting for the models ends early.
        began: `time.monotonic()` at the start, for the report and the time limit.

    Raises:
        ConfigError: a model does not start; with the cause.
    """
    try:
        _start(recipe)
        if _wait_until_ready(recipe, stop, began):
            _announce(recipe, began)
            yield
            # A second signal ends the wait.
            with _signals_set(threading.Event()) as hurry:
                drain(recipe, hurry)
        else:
            yield
    finally:
        _end()


def check_before_start(recipe: ServeRecipe) -> None:
    """Everything that can be known before Ray starts.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
        CheckpointError: a model folder is missing, or was trained with another chat template.
    """
    with socket.socket(socket.AF_INET6 if ":" in recipe.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((recipe.host, recipe.port))
        except OSError as error:
            raise ConfigError(
                f"port {recipe.port} on {recipe.host}: {(error.strerror or str(error)).lower()}; "
                "choose another with --set port=N"
            ) from None
    for model in recipe.models:
        check_model_folder(model_folder(model.path), model.chat_template)


def base_url(recipe: ServeRecipe) -> str:
    """Where the server can be reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(recipe.host, recipe.host)
    return f"http://{host}:{recipe.port}"


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

    from janus_ray.serve.app import APP_NAME, build

    _quiet()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": recipe.host, "port": recipe.port},
        logging_config={"enable_access_log": False},
    )
    application = build(resolved(recipe))
    _quiet()
    target = serve.RunTarget(application, name=APP_NAME, logging_config=LoggingConfig(enable_access_log=False))
    serve.run_many([target], wait_for_applications_running=False)


def _wait_until_ready(recipe: ServeRecipe, stop: threading.Event, began: float) -> bool:
    """Waits until /health says that every model has answered; False when a signal came first."""
    deadline = began + recipe.start_timeout_s
    progress = time.monotonic() + _PROGRESS_S
    while not stop.wait(_POLL_S):
        running, states = _state(recipe)
        # An application that this one replaces may answer for a while.
        if running and _healthy(base_url(recipe)):
            return True
        if time.monotonic() > deadline:
            raise ConfigError(
                f"the models were not ready after {recipe.start_timeout_s:g} s ({states}); logs: {_logs()}"
            )
        if time.monotonic() > progress:
            progress += _PROGRESS_S
            print(f"serve: {states} after {time.monotonic() - began:.0f} s", flush=True)
    return False


def _healthy(url: str) -> bool:
    try:
        with open_directly(f"{url}/health", 5) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _state(recipe: ServeRecipe) -> tuple[bool, str]:
    """Whether every deployment is up, and in words what each is doing.

    Raises:
        ConfigError: one has failed; with the cause.
    """
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return False, "deploying"
    shown = {model.deployment_name: f"model {model.model_id}" for model in recipe.models}
    for name, deployment in application.deployments.items():
        if deployment.status in _FAILED:
            reason = cause(deployment.message)
            if "Engine core" in reason:
                reason = engine_cause(Path(_logs())) or reason
            raise ConfigError(f"{shown.get(name, name)} did not start: {reason}; logs: {_logs()}")
    if application.status in _FAILED:
        raise ConfigError(f"the application did not start: {cause(application.message)}; logs: {_logs()}")
    up = {name: "up" if one.status == "HEALTHY" else "starting" for name, one in application.deployments.items()}
    return application.status == "RUNNING", ", ".join(f"{shown.get(name, name)} {state}" for name, state in up.items())


def cause(message: str) -> str:
    """What went wrong, from a message that ends in a traceback: the last exception with its text, on one line."""
    named = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception): .+(?:\n[ \t]+\S.*)*)", message, flags=re.MULTILINE)
    text = " ".join((named[-1] if named else message).split())
    return text[:_CAUSE_CHARACTERS] or "no reason was given"


def engine_cause(logs: Path) -> str | None:
    """What stopped the engine's own process, which tells its replica only that it has stopped.

    Args:
        logs: Ray's log folder on this node; the engine writes to its replica's standard error there.
    """
    for file in sorted(logs.glob("worker-*.err"), key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.startswith("(EngineCore")]
        named = [match[1] for line in lines if (match := re.search(r"\b(\w+(?:Error|Exception): .+)", line))]
        if named:
            return named[-1][:_CAUSE_CHARACTERS]
    return None


def _logs() -> str:
    """Ray's log folder: gateway and models under serve/, their standard error in worker-*.err."""
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    return node.get_logs_dir_path()


def _announce(recipe: ServeRecipe, began: float) -> None:
    url = base_url(recipe)
    print(f"serve: ready after {time.monotonic() - began:.0f} s")
    print(f"  page    {url}/")
    print(f"  API     {url}/v1")
    print(f"  models  {', '.join(model.model_id for model in recipe.models)}")
    print(f"  logs    {_logs()}", flush=True)


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
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

    from janus_ray.serve.app import APP_NAME, GATEWAY_NAME

    application = serve.status().applications.get(APP_NAME)
    gateway = application.deployments.get(GATEWAY_NAME) if application else None
    if gateway is None or not gateway.replica_states.get("RUNNING"):
        return 0
    gateways = serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
    for _ in range(_DRAIN_ATTEMPTS):
        try:
            return sum(gateways.broadcast("drain").results(timeout_s=_DRAIN_CALL_S))
        # A handle knows its replicas a moment after it was made.
        except DeploymentUnavailableError:
            time.sleep(_DRAIN_POLL_S)
        except (RayError, RayServeException, TimeoutError):
            break
    return 0


def _end() -> None:
    """Takes our application down on a cluster that stays up; a cluster of our own ends with everything on it."""
    if ray_address():
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
