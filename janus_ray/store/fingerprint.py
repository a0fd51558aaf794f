"""What a file, a folder or a published model or dataset holds, as a text that changes with it."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from janus_ray.errors import DataError
from janus_ray.store.files import os_reason, what_is_at
from janus_ray.store.hub import cached_commit, hub_id

# Files of ours that say how a folder was made, not what is in it.
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
LOCK = ".lock"
LEDGER = "ledger"


def fingerprint(reference: Path | str) -> str:
    """SHA-256 over a file, or over the names and contents of a folder's files; of an id on the hub its commit.

    In a folder of ours, what says how it was made (recipe, manifest, ledger) does not count; nor does any file whose
    name begins with a dot.

    Returns:
        64 hexadecimal digits; "hub:" and a commit; or "unknown:" and a random text, which equals nothing, itself
        computed again included: what cannot be looked at is never taken for unchanged.

    Raises:
        DataError: a file is there and cannot be read.
    """
    path = Path(os.path.expanduser(reference))
    if (there := what_is_at(path)) == "file":
        return _file_sha256(path)
    if there == "folder":
        return _published(path) or _folder_sha256(path)
    if found := hub_id(str(reference)):
        commits = [commit for kind in ("model", "dataset") if (commit := cached_commit(kind, found))]
        if commits:
            return "hub:" + "+".join(commits)
    print(
        f"{reference}: neither here nor in the hub's cache, so nobody can tell later whether it has changed", flush=True
    )
    return f"unknown:{uuid.uuid4().hex}"


def _published(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache: its files never change."""
    snapshots, repository = folder.parent, folder.parent.parent
    published = snapshots.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return f"hub:{folder.name}" if published else None


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(_content(folder)):
        digest.update(f"{file.relative_to(folder)}\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _content(folder: Path) -> Iterator[Path]:
    ours = (folder / RECIPE).is_file()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and path.name not in (MANIFEST, RECIPE) and not (ours and parts[0] == LEDGER):
            yield path


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error)}") from None
