"""Endpoints that run beside a job: the recipe names a provider, the job's process starts it, a stage only finds it.

Where it answers stands in an environment variable while the job runs. Whoever has set that variable beforehand names
one that is running already; on several machines that is the way, because what a job starts listens on loopback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

from pydantic import BaseModel

from janus_ray.env import MINIATURE_URL
from janus_ray.errors import ConfigError, GenerationError

# By name: a job starts it as a program of its own, and nothing else here knows it.
_PROGRAMS = {"miniature": ("janus_ray.miniature.server", MINIATURE_URL)}


@contextmanager
def providers_running(recipe: BaseModel) -> Generator[None]:
    """While the block runs, every provider that the recipe names answers.

    Raises:
        GenerationError: one did not start.
    """
    with ExitStack() as running:
        for provider in dict.fromkeys(_named(recipe)):
            program, variable = _PROGRAMS[provider]
            if not os.environ.get(variable, "").strip():
                running.enter_context(_started(provider, program, variable))
        yield


def provider_url(provider: str) -> str:
    """Where a provider answers.

    Raises:
        ConfigError: nothing says so.
    """
    program, variable = _PROGRAMS[provider]
    url = os.environ.get(variable, "").strip()
    if not url:
        raise ConfigError(f'provider = "{provider}": start it with python -m {program} and name its URL in {variable}')
    return url


def _named(section: BaseModel) -> Iterator[str]:
    """The providers in a recipe's sections that no address stands beside."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name == "provider" and value in _PROGRAMS and not getattr(section, "base_url", ""):
            yield value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from _named(inner)


@contextmanager
def _started(provider: str, program: str, variable: str) -> Generator[None]:
    """Runs the program, which prints its URL; it ends with its standard input, so it never outlives the job."""
    command = [sys.executable, "-m", program, "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url.startswith("http://"):
            raise GenerationError(f'provider = "{provider}" did not start')
        os.environ[variable] = url
        yield
    finally:
        os.environ.pop(variable, None)
        process.stdin.close()
        process.wait(timeout=10)
