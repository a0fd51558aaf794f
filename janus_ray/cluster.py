"""Starting and checking the Ray cluster a job runs on. The only place that calls `ray.init`."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from janus_ray.config import RayConfig
from janus_ray.env import PROXY_DEFAULTS, QUIET_DEFAULTS, log_level, ray_address, set_quiet_defaults
from janus_ray.errors import ConfigError
from janus_ray.metrics import reporting

_GIB = 1024**3
_REASON_CHARACTERS = 300
_CONNECT_S = 10.0


@contextmanager
def ray_cluster(config: RayConfig, needed_cpus: float, purpose: str, *, needed_gpus: float = 0) -> Generator[None]:
    """Connects to RAY_ADDRESS or starts a local cluster, and checks that the plan fits before anything is scheduled.

    A cluster that we started ends with the block; one that was running stays.

    Args:
        config: the recipe's `ray` section.
        needed_cpus: logical CPUs that the job holds at the same time.
        purpose: what they are for, said in the error.
        needed_gpus: GPUs that the job holds at the same time.

    Raises:
        ConfigError: the cluster is unreachable, or smaller than the plan. Ray itself would wait for ever.
    """
    set_quiet_defaults()
    if config.logical_cpus and not ray_address():
        _check_fits({"CPU": config.logical_cpus, "GPU": math.inf}, needed_cpus, needed_gpus, purpose)
    import ray

    try:
        _connect(config)
        _check_fits(ray.cluster_resources(), needed_cpus, needed_gpus, purpose)
        with reporting():
            yield
    finally:
        ray.shutdown()


def _connect(config: RayConfig) -> None:
    """Connects to RAY_ADDRESS, or starts a local cluster.

    Raises:
        ConfigError: it does not work; one line.
    """
    import ray

    arguments: dict[str, Any] = {"address": ray_address()}
    if arguments["address"]:
        _check_somebody_listens(arguments["address"])
    else:
        arguments = {
            "address": "local",
            "num_cpus": config.logical_cpus,
            "object_store_memory": int(config.object_store_gib * _GIB) if config.object_store_gib else None,
            "include_dashboard": config.dashboard,
        }
    again = False
    while True:
        try:
            with _our_signal_handlers_stay():
                ray.init(**arguments, log_to_driver=_verbose(), logging_level=_ray_level(), runtime_env=_runtime_env())
            return
        # Broad, because Ray raises what it likes here, bare Exception included.
        except Exception as error:
            ray.shutdown()
            if again or not _is_slowness(error):
                raise ConfigError(_why_not_started(error)) from None
        again = True
        print("ray: did not start in time, this machine seems busy; once more", flush=True)


def _check_somebody_listens(address: str) -> None:
    """Finds a wrong RAY_ADDRESS at once, where Ray itself tries for more than a minute.

    Raises:
        ConfigError: nothing listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isascii() and port.isdecimal()):
        # "auto", or something that Ray refuses in its own words.
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            pass
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})") from None


@contextmanager
def _our_signal_handlers_stay() -> Generator[None]:
    """Within the block nobody puts handlers of SIGINT and SIGTERM in the place of ours.

    Ray sets its own while it starts; theirs end the process from within, by SIGABRT where its native threads disagree.
    """
    register = signal.signal

    def kept(number: int, handler: Any) -> Any:
        ours = number in (signal.SIGINT, signal.SIGTERM)
        return signal.getsignal(number) if ours else register(number, handler)

    setattr(signal, "signal", kept)  # noqa: B010 - the type checker knows that nobody does this
    try:
        yield
    finally:
        signal.signal = register


def _is_slowness(error: Exception) -> bool:
    return not ray_address() and any(word in str(error).lower() for word in ("timed out", "timeout"))


def _why_not_started(error: Exception) -> str:
    reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
    if address := ray_address():
        if isinstance(error, ConnectionError):
            return f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})"
        return f"RAY_ADDRESS={address}: {reason}"
    if "AF_UNIX" in reason:
        return "Ray cannot start: its temporary folder has too long a name for sockets; set RAY_TMPDIR to a shorter one"
    return f"Ray cannot start: {reason}"


def _check_fits(resources: dict[str, float], needed_cpus: float, needed_gpus: float, purpose: str) -> None:
    for kind, needed in (("CPU", needed_cpus), ("GPU", needed_gpus)):
        present = resources.get(kind, 0)
        if needed > present:
            hint = "; ray.logical_cpus claims more for a local cluster" if kind == "CPU" and not ray_address() else ""
            raise ConfigError(f"{purpose} needs {needed:g} {kind}s at once, this cluster has {present:g}{hint}")


def _verbose() -> bool:
    return log_level() == "DEBUG"


def _ray_level() -> int:
    return logging.INFO if _verbose() else logging.ERROR


def _runtime_env() -> dict[str, object]:
    """Workers get our quiet defaults, and the driver's choice of offline mode."""
    names = {*QUIET_DEFAULTS, *PROXY_DEFAULTS, "HF_HUB_OFFLINE", "JANUS_LOG_LEVEL"}
    # Ray refuses a variable that `ray job submit --runtime-env-json` has set already.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    names -= submitted.get("runtime_env", {}).get("env_vars", {}).keys()
    return {"env_vars": {name: os.environ[name] for name in names if name in os.environ}}
