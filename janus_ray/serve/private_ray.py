"""Everything that serving takes from Ray beyond its public interface. The only module that may name such things.

Ray may move any of it between two versions. So each is looked up here, by name, and where one is missing the message
says in one line which, and in which version of Ray. Importing this module imports nothing of Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

from janus_ray.errors import ConfigError


def vllm_engine() -> Any:
    """The class that runs vLLM in a replica; `_prepare_engine_config` is where its engine's processes are decided.

    Raises:
        ConfigError: this version of Ray has no such thing.
    """
    engine = _named("ray.llm._internal.serve.engines.vllm.vllm_engine", "VLLMEngine")
    return with_methods(engine, "_prepare_engine_config")


def engine_callback() -> Any:
    """The base class of what is called while an engine starts.

    Raises:
        ConfigError: this version of Ray has no such thing.
    """
    return with_methods(_named("ray.llm._internal.common.callbacks.base", "CallbackBase"), "on_before_node_init")


def with_methods(base: Any, *names: str) -> Any:
    """The class, which must have the methods that a class of ours puts its own in the place of.

    Without this a method that Ray has renamed would be overridden in silence, and never called.

    Raises:
        ConfigError: it has not.
    """
    for name in names:
        if not callable(getattr(base, name, None)):
            raise _changed(f"{base.__module__}.{base.__qualname__}", f"has no {name}")
    return base


def engine_client(server: Any) -> Any:
    """The client that vLLM has of the engine that runs in a replica.

    Raises:
        ConfigError: this version of Ray keeps it elsewhere.
    """
    try:
        return server.engine._engine_client
    except AttributeError:
        raise _changed(type(server.engine).__qualname__, "has no _engine_client") from None


def logs_folder() -> str:
    """Ray's log folder on this node: gateway and models under serve/, their standard error in worker-*.err.

    Only named to people, so a Ray that keeps it elsewhere is no reason to fail.
    """
    try:
        return _named("ray._private.worker", "global_worker").node.get_logs_dir_path()
    except (ConfigError, AttributeError):
        return "session_latest/logs in Ray's temporary folder"


def serve_http() -> Any | None:
    """The HTTP options (host, port) of the Serve that runs on this cluster; None where none runs.

    Raises:
        ConfigError: this version of Ray has no such thing.
    """
    client = _named("ray.serve.context", "_get_global_client")(raise_if_no_controller_running=False)
    if client is None:
        return None
    try:
        return client.http_config
    except AttributeError:
        raise _changed(type(client).__qualname__, "has no http_config") from None


def _named(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise _changed(module, f"cannot be imported ({error})") from None
    except AttributeError:
        raise _changed(module, f"has no {name}") from None


def _changed(what: str, how: str) -> ConfigError:
    import ray

    return ConfigError(f"Ray {ray.__version__} is not the version that this janus_ray was made for: {what} {how}")
