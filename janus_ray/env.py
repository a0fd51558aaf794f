"""Every environment variable this project reads or sets, and what it is for.

Read by us:

    JANUS_LOG_LEVEL     level of our own log lines: DEBUG, INFO (default), WARNING, ERROR
    JANUS_EXPECT_GPU    "1" turns a skipped gpu test into a failure (for machines that must have one)
    JANUS_CACHE_DIR     where models that lie on an object storage are kept on each machine (~/.cache/janus_ray)
    JANUS_MINIATURE_URL where the miniature's teacher and judge answer; unset, a job that needs them starts them
    JANUS_CACHE_DIR     where models that lie on an object storage are kept on each machine (~/.cache/janus_ray)
    RAY_ADDRESS         connect to this Ray cluster instead of starting a local one
    HF_ENDPOINT         address of the Hugging Face hub, or of a mirror
    HF_HUB_OFFLINE      "1" takes models and datasets from the hub's cache alone
    HF_TOKEN            opens what is private or gated on the hub
    HF_HOME             where the hub's cache lies; HF_HUB_CACHE names the cache itself
    http_proxy          proxy for endpoints and the hub, with https_proxy and no_proxy; loopback is reached directly
    AWS_*               credentials, region and address (AWS_ENDPOINT_URL) of s3:// paths, as every AWS tool reads them
    GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST    of gs:// paths
    AZURE_STORAGE_*     account and credentials of abfs:// paths (AZURE_STORAGE_ACCOUNT_NAME, _ACCOUNT_KEY, ...)
    RAY_AUTH_MODE       "token" or "disabled"; a local cluster that we start takes "disabled" when it is unset
    RAY_JOB_CONFIG_JSON_ENV_VAR   what `ray job submit` has set for the job; Ray's
    JANUS_DEMO_PORT     port of the demo's server (jobs/miniature.sh); 8000 when it is unset

Set by us beside the tables below, for the process that serves a model and its engine:

    VLLM_LOGGING_LEVEL, VLLM_MAX_STOP_STRINGS, VLLM_CPU_OMP_THREADS_BIND, OMP_NUM_THREADS, TORCHDYNAMO_DISABLE

API keys are read from the variable that an endpoint of the recipe names (`api_key_env`), at the moment they are
needed, and are never written anywhere.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from janus_ray.errors import ConfigError

MINIATURE_URL = "JANUS_MINIATURE_URL"

# Set before Ray or Hugging Face libraries are imported, and only where the user has not decided otherwise.
QUIET_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    # Not about quiet: 30 s, Ray's own, are too short for a machine that is busy with other things.
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    # Each bucket would be asked for its kind first, and a log line be written where it does not say.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}

# What Ray Serve's HTTP proxy loads at its start: the refusal of what a full server cannot take (serve/admission.py).
PROXY_DEFAULTS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "janus_ray.serve.admission.proxy_middlewares"}


def set_quiet_defaults() -> None:
    """Turns telemetry and third-party chatter off for this process and its children; the user's settings win."""
    for name, value in {**QUIET_DEFAULTS, **PROXY_DEFAULTS}.items():
        os.environ.setdefault(name, value)


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_loopback_directly() -> None:
    """Keeps requests to this machine away from a proxy, in this process and its children.

    What a job starts itself (the miniature's teacher, a server it waits for) listens on loopback, where a proxy finds
    another machine or none. Clients differ in which spelling of no_proxy they read, so both get the same value.
    """
    names = [
        name for value in (os.environ.get("no_proxy"), os.environ.get("NO_PROXY")) for name in (value or "").split(",")
    ]
    stated = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if "*" in stated:
        return
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*stated, *(n for n in _LOOPBACK if n not in stated)])


def log_level() -> str:
    """The level of our own log lines (JANUS_LOG_LEVEL)."""
    return os.environ.get("JANUS_LOG_LEVEL", "INFO").upper()


def native_log_path(process: int | str | None = None) -> str:
    """Where a job keeps what native code writes to standard error; "*" stands for every job's."""
    return os.path.join(tempfile.gettempdir(), f"janus_ray-native-{process or os.getpid()}.log")


def cache_folder() -> Path:
    """Where models of an object storage are kept on this machine (JANUS_CACHE_DIR)."""
    named = os.environ.get("JANUS_CACHE_DIR", "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(os.path.expanduser(named or f"{base}/janus_ray"))


def ray_address() -> str | None:
    """The Ray cluster to connect to (RAY_ADDRESS); None, also for "local", starts one here."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address not in ("", "local") else None


def api_key(variable: str | None) -> str:
    """The secret in the named environment variable.

    Returns "none" where the endpoint needs no key, because the OpenAI client insists on a text.

    Raises:
        ConfigError: the variable is named but not set, or cannot be a key.
    """
    if variable is None:
        return "none"
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(f"the endpoint's key is read from the environment variable {variable}, which is not set")
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(f"the key in the environment variable {variable} holds characters that no header can carry")
    return value


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine: no proxy stands between a job and what runs beside it."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def open_directly(url: str, timeout_s: float) -> Any:
    """Opens a URL of this machine without a proxy, whatever http_proxy says; raises what `urllib.request` raises."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout_s)
