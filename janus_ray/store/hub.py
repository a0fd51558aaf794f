"""Models and datasets of the Hugging Face hub, as folders and files on this machine.

A reference is a local path or the id of something on the hub, "org/name" or "org/name@revision". What lies here comes
first; an id is downloaded into the hub's own cache, which every job and every library shares. `HF_ENDPOINT`,
`HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_HOME` mean what huggingface_hub says they mean.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from upath import UPath

from janus_ray.errors import CheckpointError, DataError, JanusError
from janus_ray.paths import is_url
from janus_ray.store.download_lines import download_lines
from janus_ray.store.fetch import fetched_folder
from janus_ray.store.files import files_below, what_is_at
from janus_ray.store.location import is_local, location
from janus_ray.store.splits import data_names, of_card, of_split, read_card

Kind = Literal["model", "dataset"]
Anything = TypeVar("Anything")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
_SHOWN_CHARACTERS = 200
# What loading a model reads. Subfolders hold the same weights for other programs.
_MODEL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
_WEIGHTS = ["*.safetensors", "pytorch_model*.bin*"]
_NOT_MODEL_FILES = ["*/*", "consolidated*"]


class Revision(NamedTuple):
    """An id on the hub, taken apart."""

    name: str
    revision: str | None


def hub_id(reference: str) -> Revision | None:
    """The id and revision, where a reference is not something on this machine and has the form of an id."""
    if not _ID.fullmatch(reference) or os.path.exists(os.path.expanduser(reference)):
        return None
    name, _, revision = reference.partition("@")
    return Revision(name, revision or None)


def model_folder(reference: str) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a published one, downloaded if need be.

    On a cluster the cache (HF_HOME) has to lie where every node sees it, as every other folder of a job.

    Raises:
        CheckpointError: there is no such folder or model, or it cannot be fetched.
    """
    try:
        where = location(reference)
    except DataError as error:
        raise CheckpointError(f"model {error}") from None
    if (there := what_is_at(where)) == "folder":
        return where if is_local(where) else fetched_folder(where, [*_MODEL_FILES, *_WEIGHTS])
    if there:
        raise CheckpointError(f"model {reference}: is a file, expected a model folder")
    if is_url(str(where)):
        raise CheckpointError(f"model {reference}: no such folder")
    if (found := hub_id(reference)) is None:
        raise CheckpointError(f"model {reference}: no such folder, and not the id of a published model (org/name)")
    folder = _snapshot("model", found, [*_MODEL_FILES, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot("model", found, [*_MODEL_FILES, "pytorch_model*.bin*"])
    return folder


def dataset_files(reference: str, split: str = "train") -> list[UPath]:
    """The files that hold a split of a dataset, in name order: of a local folder, or of a published dataset.

    A published dataset's own configuration says which files belong to a split; without one, and in a local folder,
    their names do ("train-00000-of-00003.parquet", "test.jsonl").

    Raises:
        DataError: there is no such folder, dataset or split, it holds no Parquet, JSON or CSV file, or a part of it is
            missing.
    """
    where = location(reference)
    if what_is_at(where) == "folder":
        names = data_names(found.name for found in files_below(where, deep=False))
        if not names:
            names = data_names(f"data/{found.name}" for found in files_below(where / "data", deep=False))
        if not names:
            raise DataError(f"{reference}: holds no .parquet file, and no .jsonl, .json or .csv file either")
        return [where / name for name in of_split(reference, names, split)]
    if is_url(str(where)):
        raise DataError(f"{reference}: no such file or folder")
    if (found := hub_id(reference)) is None:
        raise DataError(f"{reference}: no such file or folder, and not the id of a published dataset (org/name)")
    return _published_files(reference, found, split)


def _published_files(reference: str, found: Revision, split: str) -> list[UPath]:
    names = _names(found)
    card = read_card(_snapshot("dataset", found, ["README.md"]) / "README.md") if "README.md" in names else {}
    chosen = of_card(reference, card, names, split)
    if chosen is None:
        chosen = of_split(reference, data_names(names), split)
    folder = _snapshot("dataset", found, [glob.escape(name) for name in chosen])
    return [UPath(folder / name) for name in chosen]


def _names(found: Revision) -> list[str]:
    """Names of a published dataset's files: as the hub lists them or, where it cannot be asked, as it once did."""
    if (names := _listed("dataset", found)) is not None:
        return names
    commit = cached_commit("dataset", found)
    folder = _snapshot("dataset", found, ["README.md"])
    assert commit is not None

    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [
            entry.path
            for entry in get_cached_repo_tree(
                found.name, repo_type="dataset", revision=commit, cache_dir=cache_folder()
            )
        ]
    except CachedRepoTreeNotFoundError:
        # Not fetched by a version that keeps the list.
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def endpoint() -> str:
    """The hub's address (HF_ENDPOINT)."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it has fetched (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(cache))
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expanduser(home)) / "hub"
    return Path(constants.HF_HUB_CACHE)


def cached_commit(kind: Kind, found: Revision) -> str | None:
    """The commit at which a model or dataset lies in the cache; None where it does not."""
    folder = cache_folder() / f"{kind}s--{found.name.replace('/', '--')}"
    commit = found.revision
    if not (commit and _COMMIT.fullmatch(commit)):
        try:
            commit = (folder / "refs" / (found.revision or "main")).read_text().strip()
        except OSError:
            return None
    return commit if commit and (folder / "snapshots" / commit).is_dir() else None


def published_commit(found: Revision) -> str:
    """The commit of what an id names: the one in the cache, where it has been fetched, or the hub's at the moment.

    Raises:
        DataError: it is in no cache and the hub cannot be asked, or has no such model and no such dataset.
    """
    kinds: tuple[Kind, Kind] = ("model", "dataset")
    if cached := [commit for kind in kinds if (commit := cached_commit(kind, found))]:
        return "+".join(cached)
    if _offline():
        raise DataError(f"{found.name}: neither here nor in the cache ({cache_folder()}), and HF_HUB_OFFLINE is set")
    reasons = []
    for kind in kinds:
        try:
            return _in_one_line(kind, found, lambda kind=kind: _info(kind, found)).sha
        except (CheckpointError, DataError) as error:
            reasons.append(str(error))
    raise DataError(reasons[-1])


def _info(kind: Kind, found: Revision) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())
    look = api.model_info if kind == "model" else api.dataset_info
    return look(found.name, revision=found.revision, timeout=_TIMEOUT_S)


def _listed(kind: Kind, found: Revision) -> list[str] | None:
    """Names of the files on the hub; None where it cannot be asked and the cache holds the id."""
    if _offline():
        return None

    def ask() -> list[str]:
        return [entry.rfilename for entry in _info(kind, found).siblings or []]

    try:
        return _in_one_line(kind, found, ask)
    except _NotReached:
        if cached_commit(kind, found) is None:
            raise
        return None


def _snapshot(kind: Kind, found: Revision, patterns: list[str] | None) -> Path:
    """The folder in the cache with the files that match, fetched if need be.

    Raises:
        CheckpointError, DataError: it cannot be had; one line.
    """
    # Asked for first, because this request has a time limit and a snapshot's has none.
    reachable = _listed(kind, found) is not None

    def fetch() -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                found.name,
                repo_type=kind,
                revision=found.revision,
                endpoint=endpoint(),
                cache_dir=cache_folder(),
                local_files_only=not reachable,
                allow_patterns=patterns,
                ignore_patterns=_NOT_MODEL_FILES if kind == "model" else None,
                etag_timeout=_TIMEOUT_S,
                tqdm_class=None if sys.stderr.isatty() else download_lines(found.name),
            )
        )

    return _in_one_line(kind, found, fetch)


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


class _NotReached(CheckpointError, DataError):
    """The hub did not answer."""


def _in_one_line(kind: Kind, found: Revision, act: Callable[[], Anything]) -> Anything:
    """Does something with the hub and says in one line why it did not work.

    Raises:
        CheckpointError, DataError: by kind.
    """
    import httpx2
    from huggingface_hub import errors

    title = f"{kind} {found.name}" + (f"@{found.revision}" if found.revision else "")
    problem: type[JanusError] = CheckpointError if kind == "model" else DataError
    try:
        return act()
    except errors.GatedRepoError:
        reason = "its owner gives access on request: ask on its page, then set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"{endpoint()} has it, but not this revision"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder here, and no such {kind} on {endpoint()} (a private one needs HF_TOKEN)"
    except errors.IncompleteSnapshotError:
        reason = f"only a part of it is in the cache ({cache_folder()}), and {_why_not_asked()}"
    except errors.LocalEntryNotFoundError:
        reason = f"no such folder here, not in the cache ({cache_folder()}), and {_why_not_asked()}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = (
            f"{endpoint()} answers HTTP {status}{f': {said}' if (said := _first_line(error.server_message)) else ''}"
        )
        problem = _NotReached if status == 429 or status >= 500 else problem
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason, problem = f"no such folder here, and {endpoint()} cannot be reached ({_first_line(error)})", _NotReached
    except (errors.HFValidationError, OSError) as error:
        reason = _first_line(error)
    raise problem(f"{title}: {reason}") from None


def _why_not_asked() -> str:
    return "HF_HUB_OFFLINE is set" if _offline() else f"{endpoint()} cannot be reached"


def _first_line(what: object) -> str:
    """The first line of an error's text, or its type where it has none."""
    line = next(iter(str(what or "").splitlines()), "")[:_SHOWN_CHARACTERS]
    return line or (type(what).__name__ if isinstance(what, Exception) else "")
