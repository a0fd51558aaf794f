"""Starting and checking the Ray cluster a job runs on. The only place that calls `ray.init`."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_ray.config import RayConfig
from janus_ray.env import (
    PROXY_DEFAULTS,
    QUIET_DEFAULTS,
    is_remote,
    log_level,
    ray_address,
    ray_speaks_tls,
    ray_temporary_folder,
    set_quiet_defaults,
    submitted_job,
)
from janus_ray.errors import ClusterError, ConfigError
from janus_ray.heartbeat import Address, parse_address, watched, why_lost, why_no_head, why_silent
from janus_ray.metrics import reporting
from janus_ray.progress import duration

_GIB = 1024**3
_REASON_CHARACTERS = 300
_SUBMIT = "python -m jobs.submit NAME RECIPE.toml --address http://HOST:8265"
_WAIT_PROGRESS_S = 10.0
# Under this name jobs.submit tells a job how many CPUs its own process holds on the cluster.
ENTRYPOINT_CPUS = "janus_entrypoint_cpus"


@contextmanager
def ray_cluster(
    config: RayConfig,
    needed_cpus: float,
    purpose: str,
    *,
    needed_gpus: float = 0,
    ending: Callable[[], bool] = lambda: False,
) -> Generator[None]:
    """Connects to RAY_ADDRESS or starts a local cluster, and checks that the plan fits before anything is scheduled.

    A cluster that we started ends with the block; one that was running stays. One that goes away under the block ends
    the process in one line.

    Args:
        config: the recipe's `ray` section.
        needed_cpus: logical CPUs that the job holds at the same time.
        purpose: what they are for, said in the error.
        needed_gpus: GPUs that the job holds at the same time.
        ending: whether the job is on its way out, so that a cluster that goes is no news.

    Raises:
        ConfigError: the cluster is unreachable, or smaller than the plan. Ray itself would wait for ever.
        ClusterError: the cluster has gone.
    """
    set_quiet_defaults()
    if config.logical_cpus and not ray_address():
        _check_fits({"CPU": config.logical_cpus, "GPU": math.inf}, needed_cpus, needed_gpus, purpose)
    import ray

    try:
        _connect(config)
        head, own = _addresses()
        with watched(head, own, head_may_return=ray_address() is not None, ending=ending):
            _wait_until_it_fits(config, needed_cpus, needed_gpus, purpose)
            try:
                with reporting():
                    yield
            # Broad, because a cluster that goes shows itself in whatever waited for it.
            except Exception as error:
                if not isinstance(error, ConfigError) and (lost := why_lost(head, own)):
                    raise ClusterError(f"{lost}; run again with --if-exists resume to continue") from error
                raise
    except ClusterError:
        # Not in order: that would wait for what has gone.
        raise
    except BaseException:
        ray.shutdown()
        raise
    else:
        ray.shutdown()


def _addresses() -> tuple[Address, Address]:
    """Where the head of the cluster listens, and where Ray's process on this machine does."""
    import ray

    context = ray.get_runtime_context()
    head = parse_address(context.gcs_address)
    [node] = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    assert head is not None
    return head, Address(node["NodeManagerAddress"], node["NodeManagerPort"])


def _connect(config: RayConfig) -> None:
    """Connects to RAY_ADDRESS, or starts a local cluster.

    Raises:
        ConfigError: it does not work; one line.
    """
    import ray

    arguments: dict[str, Any] = {"address": ray_address()}
    if arguments["address"]:
        _check_a_head_answers(arguments["address"])
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


def _check_a_head_answers(address: str) -> None:
    """Finds a wrong RAY_ADDRESS at once, where Ray itself tries for more than a minute.

    Raises:
        ConfigError: it has another form than host:port or "auto", or no cluster answers there.
    """
    if address.startswith("ray://"):
        raise ConfigError(f"RAY_ADDRESS={address}: Ray Client is not used here; submit the job instead: {_SUBMIT}")
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: is the address of a dashboard, which takes submitted jobs: {_SUBMIT}; "
            "on a machine of the cluster RAY_ADDRESS is the head's host:6379, or auto"
        )
    if is_remote(address):
        raise ConfigError(f"RAY_ADDRESS={address}: expected host:port, or auto")
    found = parse_address(_of_this_machine() if address == "auto" else address)
    if found is None and ":" in address:
        raise ConfigError(f"RAY_ADDRESS={address}: expected host:port, or auto")
    if found is None:
        # Nothing known of this machine's clusters, or a word that Ray refuses in its own.
        return
    shown = f"RAY_ADDRESS={address}" + (f" ({found})" if address == "auto" else "")
    reason = why_silent(found) or (None if ray_speaks_tls() else why_no_head(found))
    if reason:
        hint = "" if reason[0].isupper() else "; its port is 6379 unless `ray start` said otherwise"
        raise ConfigError(f"{shown}: no Ray cluster answers there ({reason}{hint})")


def _of_this_machine() -> str:
    """The cluster that was last started on this machine, where "auto" leads; empty without one."""
    try:
        return Path(ray_temporary_folder(), "ray_current_cluster").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


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
        if type(error).__name__ == "AuthenticationError":
            return (
                f"RAY_ADDRESS={address}: the cluster does not take our token ({reason}); set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            )
        if isinstance(error, ConnectionError):
            return f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})"
        return f"RAY_ADDRESS={address}: {reason}"
    if "AF_UNIX" in reason:
        return "Ray cannot start: its temporary folder has too long a name for sockets; set RAY_TMPDIR to a shorter one"
    return f"Ray cannot start: {reason}"


def _wait_until_it_fits(config: RayConfig, needed_cpus: float, needed_gpus: float, purpose: str) -> None:
    """Checks that the cluster is large enough, and asks one that grows to do so for as long as the recipe says.

    What is asked for is a placement group: it goes with this process, however that ends, so that no machine stays up
    for a job that is no more.

    Raises:
        ConfigError: the cluster is smaller than the plan, and stayed so.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    wait_s = config.wait_for_nodes_s if ray_address() else 0.0
    if not wait_s or not _missing(ray.cluster_resources(), needed_cpus, needed_gpus):
        _check_fits(ray.cluster_resources(), needed_cpus, needed_gpus, purpose)
        return
    gpus, cpus = math.ceil(needed_gpus), math.ceil(needed_cpus + _own_cpus())
    bundles = [{"GPU": 1.0, "CPU": 1.0}] * gpus + [{"CPU": 1.0}] * max(cpus - gpus, 0)
    asked = placement_group(bundles)
    began, said = time.monotonic(), 0.0
    try:
        while missing := _missing(ray.cluster_resources(), needed_cpus, needed_gpus):
            waited = time.monotonic() - began
            if waited > wait_s:
                break
            if waited >= said:
                said = waited + _WAIT_PROGRESS_S
                left = duration(wait_s - waited)
                print(f"ray: waiting for nodes: {purpose} needs {missing}; {left} left", flush=True)
            time.sleep(min(1.0, wait_s))
    finally:
        remove_placement_group(asked)
    _check_fits(ray.cluster_resources(), needed_cpus, needed_gpus, purpose)


def _own_cpus() -> float:
    """CPUs of the cluster that this very process holds, where it was submitted by jobs.submit."""
    submitted = submitted_job()
    return float(submitted.metadata.get(ENTRYPOINT_CPUS, 0)) if submitted else 0.0


def _missing(resources: dict[str, float], needed_cpus: float, needed_gpus: float) -> str | None:
    """What a cluster lacks, in words."""
    for kind, needed, held in (("CPU", needed_cpus, _own_cpus()), ("GPU", needed_gpus, 0.0)):
        present = resources.get(kind, 0)
        if needed + held > present:
            besides = f" besides the {held:g} of the job's own process (--entrypoint-cpus)" if held else ""
            return f"{needed:g} {kind}s at once{besides}, this cluster has {present:g}"
    return None


def _check_fits(resources: dict[str, float], needed_cpus: float, needed_gpus: float, purpose: str) -> None:
    if missing := _missing(resources, needed_cpus, needed_gpus):
        local = "; ray.logical_cpus claims more for a local cluster" if " CPUs at once" in missing else ""
        grows = "; ray.wait_for_nodes_s waits for one that grows"
        raise ConfigError(f"{purpose} needs {missing}{grows if ray_address() else local}")


def _verbose() -> bool:
    return log_level() == "DEBUG"


def _ray_level() -> int:
    return logging.INFO if _verbose() else logging.ERROR


def _runtime_env() -> dict[str, object]:
    """Workers get our quiet defaults, and the driver's choice of offline mode.

    Not how Ray's processes trust each other: whoever started the cluster has decided that.
    """
    names = {*QUIET_DEFAULTS, *PROXY_DEFAULTS, "HF_HUB_OFFLINE", "JANUS_LOG_LEVEL"}
    if submitted := submitted_job():
        # Ray refuses a variable that `ray job submit --runtime-env-json` has set already.
        names -= submitted.variables.keys()
    return {"env_vars": {name: os.environ[name] for name in names if name in os.environ}}
