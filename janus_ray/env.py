"""Every environment variable this project reads or sets, and what it is for.

Read by us:

    JANUS_LOG_LEVEL     level of our own log lines: DEBUG, INFO (default), WARNING, ERROR
    JANUS_STORAGE       shared storage (s3://bucket/folder, or a folder that every node sees) under which a job that was
                        submitted to a cluster finds and puts what its recipe names by a relative path
    JANUS_EXPECT_GPU    "1" turns a skipped gpu test into a failure (for machines that must have one)
    JANUS_MINIATURE_URL where the miniature's teacher and judge answer; unset, a job that needs them starts them
    JANUS_CACHE_DIR     where models that lie on an object storage are kept on each machine; janus_ray below
                        XDG_CACHE_HOME, or ~/.cache/janus_ray
    JANUS_DEMO_PORT     port of the server that jobs/miniature.sh starts; 8000
    JANUS_DEMO_FOLDER   where jobs/miniature.sh writes; runs/miniature
    RAY_ADDRESS         connect to this Ray cluster instead of starting a local one
    RAY_API_SERVER_ADDRESS  the dashboard that jobs.submit speaks to, where --address does not say
    RAY_TMPDIR          where a local cluster keeps its files, and where the address "auto" looks for a running one
    RAY_USE_TLS         "1" where the cluster at RAY_ADDRESS speaks TLS; read by Ray
    RAY_HEAD_IP         the head's address in cluster.yaml and its variants; set by `ray up`
    RAY_JOB_CONFIG_JSON_ENV_VAR  set by Ray in a job that was submitted: its runtime environment and metadata
    HF_ENDPOINT         address of the Hugging Face hub, or of a mirror
    HF_HUB_OFFLINE      "1" takes models and datasets from the hub's cache alone
    HF_TOKEN            opens what is private or gated on the hub
    HF_HOME             where the hub's cache lies; HF_HUB_CACHE names the cache itself
    http_proxy          proxy for endpoints and the hub, with https_proxy and no_proxy (NO_PROXY); loopback is reached
                        directly
    AWS_*               credentials, region and address (AWS_ENDPOINT_URL) of s3:// paths, as every AWS tool reads them
    GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST    of gs:// paths
    AZURE_STORAGE_*     account and credentials of abfs:// paths (AZURE_STORAGE_ACCOUNT_NAME, _ACCOUNT_KEY, ...)
    RAY_AUTH_MODE       "token" or "disabled"; a local cluster that we start takes "disabled" when it is unset, one that
                        was running is never told
    RAY_AUTH_TOKEN      the token of a cluster that asks for one; RAY_AUTH_TOKEN_PATH, the file it lies in; read by Ray

Set by us beside the tables below, for the process that serves a model and its engine:

    VLLM_LOGGING_LEVEL, VLLM_MAX_STOP_STRINGS, VLLM_CPU_OMP_THREADS_BIND, OMP_NUM_THREADS, TORCHDYNAMO_DISABLE

API keys are read from the variable that an endpoint of the recipe names (`api_key_env`), at the moment they are
needed, and are never written anywhere.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from janus_ray.errors import ConfigError

MINIATURE_URL = "JANUS_MINIATURE_URL"

# Set before Ray or Hugging Face libraries are imported, and only where the user has not decided otherwise.
QUIET_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
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

# Ray's own description of a process of its own that died, with the end of a log; we say it in one line.
_WHAT_WE_SAY_OURSELVES = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Raylet is terminated|has been marked dead because|A worker died or was killed"
}

# Only for a cluster of our own, which listens to this machine's users; a running one decides for itself.
OWN_CLUSTER_DEFAULTS = {"RAY_AUTH_MODE": "disabled"}

# What Ray Serve's HTTP proxy loads at its start: the refusal of what a full server cannot take (serve/admission.py).
PROXY_DEFAULTS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "janus_ray.serve.admission.proxy_middlewares"}


def set_quiet_defaults(*, own_cluster: bool | None = None) -> None:
    """Turns telemetry and third-party chatter off for this process and its children; the user's settings win.

    Args:
        own_cluster: whether this process starts a Ray cluster; None where that is so without RAY_ADDRESS.
    """
    defaults = {**QUIET_DEFAULTS, **PROXY_DEFAULTS}
    if log_level() != "DEBUG":
        defaults |= _WHAT_WE_SAY_OURSELVES
    if ray_address() is None if own_cluster is None else own_cluster:
        defaults |= OWN_CLUSTER_DEFAULTS
    for name, value in defaults.items():
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


def ray_temporary_folder() -> str:
    """Where Ray keeps what it knows of clusters on this machine (RAY_TMPDIR)."""
    return os.path.join(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")


def ray_speaks_tls() -> bool:
    """Whether the cluster at RAY_ADDRESS is spoken to in TLS (RAY_USE_TLS)."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def dashboard_address() -> str:
    """The dashboard that takes jobs: RAY_API_SERVER_ADDRESS, a RAY_ADDRESS that is a dashboard's, or this machine's."""
    stated = os.environ.get("RAY_API_SERVER_ADDRESS", "").strip()
    if not stated and (ray_address() or "").startswith(("http://", "https://", "ray://")):
        stated = ray_address() or ""
    return stated or "http://127.0.0.1:8265"


def ray_token() -> str | None:
    """The token that a cluster asks for, found as Ray finds it; None without RAY_AUTH_MODE=token.

    Raises:
        ConfigError: it is asked for, and there is none that can be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        with open(path, encoding="ascii") as file:
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no token"
        raise ConfigError(f"RAY_AUTH_MODE=token, but {path}: {reason}; set RAY_AUTH_TOKEN") from None
    if not token:
        raise ConfigError(f"RAY_AUTH_MODE=token, but {path} is empty; set RAY_AUTH_TOKEN")
    return token


class SubmittedJob(NamedTuple):
    """What Ray says to a job that was submitted to a cluster."""

    variables: dict[str, str]
    """Environment variables of its runtime environment."""
    metadata: dict[str, str]
    """What the submitter wrote about it."""


def submitted_job() -> SubmittedJob | None:
    """How this job was submitted to a cluster, by `ray job submit` or jobs.submit; None where a person started it."""
    if not (text := os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")):
        return None
    stated = json.loads(text)
    return SubmittedJob((stated.get("runtime_env") or {}).get("env_vars") or {}, stated.get("metadata") or {})


def is_remote(reference: str) -> bool:
    """Whether a reference names its storage, as "s3://bucket/folder" does."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", reference) is not None


def storage_root() -> str | None:
    """The shared storage of submitted jobs (JANUS_STORAGE), without a slash at its end; None where it is not set.

    Raises:
        ConfigError: it is neither an address nor an absolute folder.
    """
    root = os.environ.get("JANUS_STORAGE", "").strip()
    if not root:
        return None
    if not (is_remote(root) or root.startswith("/")) or not root.isprintable():
        raise ConfigError(
            f"JANUS_STORAGE={root!r}: expected an address such as s3://bucket/folder, or an absolute folder that every "
            "node sees"
        )
    return root.rstrip("/") or "/"


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
