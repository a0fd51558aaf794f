"""Starting and checking the Ray cluster a job runs on. The only place that calls `ray.init`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

from janus_ray.config import RayConfig
from janus_ray.env import PROXY_DEFAULTS, QUIET_DEFAULTS, log_level, ray_address, set_quiet_defaults
from janus_ray.errors import ConfigError

_GIB = 1024**3


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
    import ray

    address = ray_address()
    try:
        if address:
            ray.init(address=address, log_to_driver=_verbose(), logging_level=_ray_level(), runtime_env=_runtime_env())
        else:
            store_bytes = int(config.object_store_gib * _GIB) if config.object_store_gib else None
            ray.init(
                address="local",
                num_cpus=config.logical_cpus,
                object_store_memory=store_bytes,
                include_dashboard=config.dashboard,
                log_to_driver=_verbose(),
                logging_level=_ray_level(),
                runtime_env=_runtime_env(),
            )
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
    try:
        _check_fits(ray.cluster_resources(), needed_cpus, needed_gpus, purpose)
        yield
    finally:
        ray.shutdown()


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


def quiet_ray_data() -> None:
    """Keeps Ray Data's bars and plan dumps off the terminal; our own progress lines stand in for them."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = _verbose()
    context.print_on_execution_start = _verbose()
    logging.getLogger("ray.data").setLevel(_ray_level())
