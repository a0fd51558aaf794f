"""What a relative path of a recipe means in a job that was submitted to a cluster.

Such a job runs in a copy of the working directory on some machine, and the copy goes with the job: what it writes there
is lost, and what git ignores was never sent. So relative paths of outputs, and of inputs that were not sent, lie under
the cluster's shared storage (JANUS_STORAGE), and without one the job refuses them before anything starts.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable

from janus_ray.config import AnyRecipe, named_paths, resolved, validate
from janus_ray.env import is_remote, storage_root
from janus_ray.errors import ConfigError
from janus_ray.store.files import what_is_at
from janus_ray.store.hub import hub_id

_OUTPUTS = ("output_dir", "output_path")


def is_output(field: str) -> bool:
    """Whether a field of a recipe, by its path, says where the job writes."""
    return field.rpartition(".")[2] in _OUTPUTS


def is_relative(path: str) -> bool:
    """Whether what a path means depends on the folder that a job runs in."""
    return not (is_remote(path) or os.path.isabs(path))


def under(root: str, path: str) -> str:
    """A relative path, under the root of a storage.

    Raises:
        ConfigError: it leads out of the folder it is relative to.
    """
    normal = posixpath.normpath(path)
    if normal.split("/")[0] == "..":
        raise ConfigError(f"{path}: leads out of the working directory; a submitted job takes an absolute path there")
    return root if normal == "." else f"{root.rstrip('/')}/{normal}"


def on_storage(recipe: AnyRecipe, was_sent: Callable[[str], bool] = os.path.exists) -> AnyRecipe:
    """The recipe of a submitted job, in which no path depends on where the job runs.

    An output lies under JANUS_STORAGE. An input that was sent with the job is read from there, another from
    JANUS_STORAGE; what has the form of a hub id stays one, unless the storage holds something of that name.

    Args:
        recipe: as loaded.
        was_sent: whether a relative path is among the files that were sent.

    Raises:
        ConfigError: a path is relative and there is no JANUS_STORAGE.
        DataError: nobody may look what that storage holds.
    """
    root, values = storage_root(), resolved(recipe)
    moved = False
    for field, path in named_paths(recipe):
        if not is_relative(path) or (not is_output(field) and was_sent(path)):
            continue
        if not is_output(field) and hub_id(path) and not (root and what_is_at(under(root, path))):
            continue
        if root is None:
            why = "would be lost with the job's working directory" if is_output(field) else "was not sent with the job"
            raise ConfigError(
                f"{field} = {path!r} is relative and {why}; name a place that every node reaches "
                f"(--set {field}=s3://... or an absolute folder), or set JANUS_STORAGE to the storage that relative "
                "paths lie under"
            )
        _set(values, field, under(root, path))
        moved = True
    return validate(type(recipe), values, "recipe") if moved else recipe


def _set(values: dict[str, object], field: str, value: str) -> None:
    inner: object = values
    *sections, last = field.split(".")
    for key in sections:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]  # ty: ignore[not-subscriptable]
    assert isinstance(inner, dict)
    inner[last] = value
