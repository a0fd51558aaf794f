"""Paths that people write: a file or folder of a file system, or an object or prefix of an object storage."""

from __future__ import annotations

import os
import re

from janus_ray.text import one_line

# Spellings that the storages' own tools take, and the one that stands in messages and records.
SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfs", "az": "abfs"}
ALLOWED = "a local path, s3://bucket/..., gs://bucket/... or abfs://container@account.dfs.core.windows.net/..."
# In bytes, and about what Linux takes; an object's whole key has at most 1024.
_LONGEST_NAME, _LONGEST_PATH, _LONGEST_KEY = 255, 4000, 1024
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ACCOUNT = re.compile(r"[A-Za-z0-9$][A-Za-z0-9$-]*@[a-z0-9]+(\.[A-Za-z0-9-]+)+")


def checked_path(text: str) -> str:
    """The path of a recipe as it is used from here on, in the one spelling that `spelled_path` gives.

    Raises:
        ValueError: it cannot be a path of a kind that we read; the message says why and shows no secret.
    """
    if not text.isprintable():
        raise ValueError("must be a path without control characters")
    expanded = spelled_path(text)
    if is_url(expanded):
        return expanded
    if max(len(os.fsencode(part)) for part in expanded.split("/")) > _LONGEST_NAME or len(expanded) > _LONGEST_PATH:
        raise ValueError(f"must be a path of at most {_LONGEST_PATH} characters with names of at most {_LONGEST_NAME}")
    return expanded


def spelled_path(text: str) -> str:
    """The path with "~" expanded; a URL in its one spelling without a slash at its end.

    Raises:
        ValueError: it names nothing of a kind that we read.
    """
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must be a path without control characters")
    if (url := _url(text)) is not None:
        return url
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{one_line(text.split('/')[0])}: no such user")
    return expanded


def is_url(text: str) -> bool:
    """Whether a checked path leads to an object storage."""
    return text.partition("://")[0] in SCHEMES.values() and "://" in text


def is_inside(path: str, folder: str) -> bool:
    """Whether a checked path is the folder or lies below it; links of a file system are followed."""
    if is_url(path) != is_url(folder):
        return False
    if not is_url(path):
        path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _url(text: str) -> str | None:
    """The URL in its one spelling; None for a path of a file system.

    Raises:
        ValueError: it is meant as a URL, and is none that we read.
    """
    stripped = text.strip()
    if (match := _URL.fullmatch(stripped)) is None:
        if "://" in stripped:
            raise ValueError(f"{_scheme_shown(stripped)}: unknown kind of path; allowed: {ALLOWED}")
        return None
    scheme, slashes, rest = match[1].lower(), match[2], match[3]
    if scheme == "file":
        return _local(slashes, rest)
    if scheme not in SCHEMES:
        # A file's name may hold a colon, and then stands behind no slashes.
        if "://" not in stripped and not slashes:
            return None
        hint = " (what lies on the hub is named org/name)" if scheme == "hf" or "huggingface.co" in rest else ""
        raise ValueError(f"{_scheme_shown(stripped)}: unknown kind of path{hint}; allowed: {ALLOWED}")
    if slashes not in ("//", "///"):
        raise ValueError(f"must be written {scheme}://{'container' if SCHEMES[scheme] == 'abfs' else 'bucket'}/...")
    return _object(scheme, rest if slashes == "//" else "")


def _scheme_shown(text: str) -> str:
    return one_line(text.partition(":/")[0][:40]) + "://"


def _local(slashes: str, rest: str) -> str:
    """The path of a file: URL, which names no other machine and encodes nothing."""
    if slashes == "//" and rest.startswith("localhost/"):
        slashes, rest = "/", rest.removeprefix("localhost/")
    if slashes not in ("/", "///") or not rest:
        raise ValueError("must be written file:///folder/name, or as a plain path")
    return f"/{rest}"


def _object(scheme: str, rest: str) -> str:
    bucket, _, key = rest.partition("/")
    what = "container" if SCHEMES[scheme] == "abfs" else "bucket"
    if not bucket:
        raise ValueError(f"{scheme}:// must name a {what}: {scheme}://{what}/...")
    named = _BUCKET.fullmatch(bucket) or (what == "container" and _ACCOUNT.fullmatch(bucket))
    if not named:
        # What stands before an @ may be a secret, so it is not shown.
        shown = "" if "@" in bucket or ":" in bucket else f" (got {bucket[:80]!r})"
        reason = "a bucket has letters, digits, dots, dashes; credentials come from the environment"
        raise ValueError(f"{scheme}:// must name a {what}: {reason}{shown}")
    key = key.rstrip("/")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise ValueError(
            f"a {scheme}:// path must not hold //, . or .. as a part: an object storage has no such folders"
        )
    if not key.isprintable():
        raise ValueError("must be a path without control characters")
    if "?" in key:
        raise ValueError(f"a {scheme}:// path must not hold ?: versions and options cannot be named")
    if len(key.encode("utf-8", "surrogateescape")) > _LONGEST_KEY:
        raise ValueError(f"a {scheme}:// path must have at most {_LONGEST_KEY} bytes behind its {what}")
    return f"{SCHEMES[scheme]}://{bucket}" + (f"/{key}" if key else "")
