"""Prompt texts, one file each, and the function that fills them in.

The texts are Jinja templates; an unknown or missing variable is an error. The hash of a text goes into the content
key of every request that uses it, so that a reworded prompt is never answered from an old ledger.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

_FOLDER = Path(__file__).parent
_ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


def render(name: str, **variables: object) -> str:
    """The prompt `name` with its variables filled in, without surrounding blank space.

    Raises:
        jinja2.UndefinedError: a variable of the text was not given.
    """
    return _template(name).render(**variables).strip()


def prompt_sha256(name: str) -> str:
    """Hash of the text of a prompt, before anything is filled in."""
    return hashlib.sha256(_text(name).encode()).hexdigest()


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.txt").read_text()


@cache
def _template(name: str) -> Template:
    return _ENVIRONMENT.from_string(_text(name))
