"""Every environment variable this project reads or sets, and what it is for.

Read by us:

    JANUS_LOG_LEVEL     level of our own log lines: DEBUG, INFO (default), WARNING, ERROR
    JANUS_EXPECT_GPU    "1" turns a skipped gpu test into a failure (for machines that must have one)
    RAY_ADDRESS         connect to this Ray cluster instead of starting a local one
    RAY_AUTH_MODE       "token" or "disabled"; a local cluster that we start takes "disabled" when it is unset

API keys are read from the variable that an endpoint of the recipe names (`api_key_env`), at the moment they are
needed, and are never written anywhere.
"""

from __future__ import annotations

import os
import tempfile

from janus_ray.errors import ConfigError

# Set before Ray or Hugging Face libraries are imported, and only where the user has not decided otherwise.
QUIET_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def set_quiet_defaults() -> None:
    """Turns telemetry and third-party chatter off for this process and its children; the user's settings win."""
    for name, value in QUIET_DEFAULTS.items():
        os.environ.setdefault(name, value)


def log_level() -> str:
    """The level of our own log lines (JANUS_LOG_LEVEL)."""
    return os.environ.get("JANUS_LOG_LEVEL", "INFO").upper()


def native_log_path() -> str:
    """Where a job keeps what native code writes to standard error."""
    return os.path.join(tempfile.gettempdir(), f"janus_ray-native-{os.getpid()}.log")


def ray_address() -> str | None:
    """The Ray cluster to connect to (RAY_ADDRESS); None starts a local one."""
    return os.environ.get("RAY_ADDRESS") or None


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
