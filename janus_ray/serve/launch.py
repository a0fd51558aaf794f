"""Starting the application from a job: checks first, then Ray, then wait until every model has answered."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_ray.chat import check_model_folder
from janus_ray.cluster import ray_cluster
from janus_ray.config import resolved
from janus_ray.env import log_level, ray_address
from janus_ray.errors import ConfigError
from janus_ray.serve.recipe import ServeRecipe

_POLL_S = 0.5
_PROGRESS_S = 10.0


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
    # Importing vLLM takes as long as starting Ray; the two run side by side.
    importing = threading.Thread(target=_import_engine, daemon=True)
    importing.start()
    purpose = f"serving {len(recipe.models)} model{'s' if len(recipe.models) > 1 else ''} behind the gateway"
    with ray_cluster(recipe.ray, recipe.needed_cpus(), purpose, needed_gpus=recipe.needed_gpus()):
        try:
            # Ray has just put its own handlers in the place of ours.
            _set_signals(stop)
            _start(recipe, importing)
            if _wait_until_ready(recipe, stop, began):
                _announce(recipe, began)
            yield base_url(recipe)
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
                f"port {recipe.port} on {recipe.host}: {os.strerror(error.errno or 0).lower()}; "
                "choose another with --set port=N"
            ) from None
    for model in recipe.models:
        check_model_folder(model.path)


def base_url(recipe: ServeRecipe) -> str:
    """Where the server can be reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(recipe.host, recipe.host)
    return f"http://{host}:{recipe.port}"


def _import_engine() -> None:
    _quiet()
    import janus_ray.serve.engine  # noqa: F401


def _quiet() -> None:
    """Keeps what vLLM and Ray Serve report of themselves off the terminal; the replicas' logs hold it."""
    if log_level() == "DEBUG":
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    logging.getLogger("ray.llm").setLevel(logging.ERROR)


def _start(recipe: ServeRecipe, importing: threading.Thread) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from janus_ray.serve.app import APP_NAME, build

    _quiet()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": recipe.host, "port": recipe.port},
        logging_config={"enable_access_log": False},
    )
    importing.join()
    absolute = [model.model_copy(update={"path": str(Path(model.path).absolute())}) for model in recipe.models]
    application = build(resolved(recipe.model_copy(update={"models": absolute})))
    _quiet()
    target = serve.RunTarget(application, name=APP_NAME, logging_config=LoggingConfig(enable_access_log=False))
    serve.run_many([target], wait_for_applications_running=False)


def _wait_until_ready(recipe: ServeRecipe, stop: threading.Event, began: float) -> bool:
    """Waits until /health says that every model has answered; False when a signal came first."""
    deadline = began + recipe.start_timeout_s
    progress = began + _PROGRESS_S
    while not stop.wait(_POLL_S):
        if _healthy(base_url(recipe)):
            return True
        states = _raise_if_failed()
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
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _raise_if_failed() -> str:
    """What each deployment is doing.

    Raises:
        ConfigError: one has failed; with the cause.
    """
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return "deploying"
    for name, deployment in application.deployments.items():
        if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigError(f"{_human(name)} did not start: {cause(deployment.message)}; logs: {_logs()}")
    if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise ConfigError(f"the application did not start: {cause(application.message)}; logs: {_logs()}")
    return ", ".join(_states(application.deployments))


def _states(deployments: dict[str, Any]) -> Iterator[str]:
    for name, deployment in deployments.items():
        yield f"{_human(name)} {'up' if deployment.status == 'HEALTHY' else 'starting'}"


def _human(deployment_name: str) -> str:
    return deployment_name.replace("model:", "model ").replace("--", "/")


def cause(message: str) -> str:
    """The line of a traceback that says what went wrong: the last one that names an exception."""
    named = re.findall(r"^\s*(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", message, flags=re.MULTILINE)
    informative = [(kind, text) for kind, text in named if kind != "RayTaskError"]
    if informative:
        kind, text = informative[-1]
        return f"{kind}: {text.strip()}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def _logs() -> str:
    """The folder where Serve keeps the logs of gateway and models."""
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    return os.path.join(node.get_logs_dir_path(), "serve")


def _announce(recipe: ServeRecipe, began: float) -> None:
    url = base_url(recipe)
    print(f"serve: ready after {time.monotonic() - began:.0f} s")
    print(f"  page    {url}/")
    print(f"  API     {url}/v1")
    print(f"  models  {', '.join(model.model_id for model in recipe.models)}")
    print(f"  logs    {_logs()}", flush=True)


def _end() -> None:
    """Takes our application down; on a cluster of others nothing else."""
    from ray import serve

    from janus_ray.serve.app import APP_NAME

    if ray_address():
        serve.delete(APP_NAME)
    else:
        serve.shutdown()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _signals_set(stop: threading.Event) -> Generator[None]:
    """Within the block SIGINT and SIGTERM set the event."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _set_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_signals(stop: threading.Event) -> None:
    for number in _SIGNALS:
        signal.signal(number, lambda *_: stop.set())
