"""What a file, a folder or a published model or dataset is, as a text that changes when it does.

Nothing is downloaded for it: a file system is read, a storage is asked for what it knows of its objects, and the hub
for a commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from janus_ray.errors import DataError
from janus_ray.store.files import files_below, what_is_at
from janus_ray.store.hub import hub_id, published_commit
from janus_ray.store.location import is_local, location, object_revision, one_line_errors

# Files of ours that say how a folder was made, not what is in it.
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
INPUTS = "inputs.json"
LOCK = ".lock"
LEDGER = "ledger"


def fingerprint(reference: Path | UPath | str) -> str:
    """The revision of what a reference names.

    In a folder of ours, what says how it was made (recipe, inputs, manifest, ledger) does not count; nor does any file
    whose name begins with a dot.

    Returns:
        Of a file its SHA-256, of a folder one over the names and contents of its files, each 64 hexadecimal digits; of
        what lies on an object storage the same over names, sizes and the storage's own checksums (an etag, an MD5, a
        generation), with the scheme before it; of an id on the hub "hub:" and a commit.

    Raises:
        DataError: nothing is there, or it cannot be looked at: what nobody can compare is never taken for unchanged.
    """
    if found := hub_id(str(reference)):
        return "hub:" + published_commit(found)
    where = location(reference)
    there = what_is_at(where)
    if there is None:
        raise DataError(f"{reference}: no such file or folder, and not the id of something published (org/name)")
    if not is_local(where):
        return _remote(where, there)
    return _file_sha256(where) if there == "file" else _published(where) or _folder_sha256(where)


def _published(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the hub's cache: its files never change."""
    snapshots, repository = folder.parent, folder.parent.parent
    published = snapshots.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return f"hub:{folder.name}" if published else None


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    files = (file for file in folder.rglob("*") if file.is_file())
    for name in _content(file.relative_to(folder).as_posix() for file in files):
        digest.update(f"{name}\0{_file_sha256(folder / name)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _content(names: Iterator[str]) -> list[str]:
    """The names below a folder that are its content, in order."""
    found = sorted(names)
    ours = RECIPE in found
    return [
        name
        for name in found
        if not any(part.startswith(".") for part in name.split("/"))
        and name.rpartition("/")[2] not in (MANIFEST, RECIPE)
        and not (ours and (name.startswith(f"{LEDGER}/") or name == INPUTS))
    ]


def _file_sha256(path: Path) -> str:
    with one_line_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remote(where: UPath, there: str) -> str:
    digest = hashlib.sha256()
    if there == "file":
        with one_line_errors(where):
            info = where.fs.info(where.path)
        digest.update(object_revision(where, info).encode())
    else:
        found = {each.name: each for each in files_below(where)}
        for name in _content(iter(found)):
            digest.update(f"{name}\0{object_revision(found[name].where, found[name].info)}\n".encode())
    return f"{where.protocol}:{digest.hexdigest()}"
