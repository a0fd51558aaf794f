"""Checkpoints of a run: each whole or absent, found by looking into the folder and by no list that someone keeps.

A checkpoint is a folder `checkpoints/checkpoint_<step>` with the shards that PyTorch writes and, written last, a record
of its files' sizes and hashes. It is made beside its place and renamed, so that a killed or failed save leaves nothing
that could be taken for one; what was damaged later shows in the record. Nothing in it knows where the folder lies.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from janus_ray.errors import CheckpointError, DataError
from janus_ray.store.files import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHECKPOINTS = "checkpoints"
_STAGING = ".staging"
_PREFIX = "checkpoint_"
_RECORD = "checkpoint.json"
_CHUNK = 1 << 24
# How PyTorch's stream writer answers a full disk.
_NOT_WRITTEN = re.compile("PytorchStreamWriter|inline_container|unexpected pos")


def save_checkpoint(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any], folder: Path, keep: int
) -> None:
    """Writes a checkpoint below the run's folder and removes older ones. All ranks must call it.

    Args:
        model: the sharded model.
        optimizer: its optimizer.
        progress: what else a resume needs, JSON-ready; "step" is the number of finished steps.
        folder: the run's folder, which all ranks see.
        keep: how many checkpoints stay, this one included.

    Raises:
        CheckpointError: it cannot be written; the older ones stay.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    target = folder / CHECKPOINTS / f"{_PREFIX}{progress['step']:08d}"
    staging = folder / CHECKPOINTS / _STAGING / target.name
    weights, optimizer_state = get_state_dict(model, optimizer)
    with named_when_not_written(target):
        if dist.get_rank() == 0:
            _remove(staging)
            staging.mkdir(parents=True)
        dist.barrier()
        try:
            dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=staging)
            files = _hashed_together(staging)
            if dist.get_rank() == 0:
                write_json(staging / _RECORD, {"progress": dict(progress), "files": files})
                _remove(target)
                staging.rename(target)
        except BaseException:
            _remove(staging)
            raise
    if dist.get_rank() == 0:
        _prune(folder, progress["step"], keep)


def load_checkpoint(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills model and optimizer from a checkpoint, on any number of workers, and returns its progress.

    Args:
        model: the sharded model.
        optimizer: its optimizer.
        checkpoint: its folder, as `newest_healthy` gives it.
        expected: the progress of a fresh run: "step" is replaced, everything else must be equal.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another template or another model.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    progress = read_json(checkpoint / _RECORD)["progress"]
    for name, value in expected.items():
        if name != "step" and progress.get(name) != value:
            raise CheckpointError(f"checkpoint {checkpoint}: made with another {name}; it cannot continue this run")
    weights, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": optimizer_state}
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise CheckpointError(f"checkpoint {checkpoint}: does not fit this model: {_first_line(causes[0])}") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return progress


def newest_healthy(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what its record says, and one line for each newer one that is not.

    Reads every byte of the checkpoints that it looks at.
    """
    complaints = []
    for checkpoint in reversed(_checkpoints(folder)):
        complaint = _complaint(checkpoint)
        if complaint is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint}: {complaint}")
    return None, complaints


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's record says of the run: "step", "loss" and what else was saved with it."""
    return read_json(checkpoint / _RECORD)["progress"]


def remove_leftovers(folder: Path) -> None:
    """Removes what killed saves and exports left behind; no other process may be writing in the folder."""
    _remove(folder / CHECKPOINTS / _STAGING)
    for half_written in (*folder.glob(".*.tmp"), *folder.glob("documents/.*.tmp")):
        half_written.unlink(missing_ok=True)


@contextmanager
def named_when_not_written(target: Path) -> Generator[None]:
    """Turns what libraries raise when a disk is full or read-only into one line that names the target.

    Raises:
        CheckpointError: the block could not write.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, DataError, RuntimeError, SafetensorError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = next(filter(None, map(_why_not_written, causes)), None)
        if reason is None:
            # Not the disk: another worker died, say.
            raise
        raise CheckpointError(
            f"{target} cannot be written: {reason}; what was saved before is kept: once this is mended, "
            "--if-exists resume continues from there"
        ) from None


def _hashed_together(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file; every rank reads those that it wrote itself, rank 0 the rest."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = sorted(path for path in folder.iterdir() if _writer(path.name) == rank)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, _hashed(own))
    return {name: entry for entries in gathered for name, entry in sorted(entries.items())}


def _writer(name: str) -> int:
    """The rank that wrote a file of a sharded checkpoint, which its name begins with: "__1_0.distcp"."""
    number = name.removeprefix("__").split("_")[0]
    return int(number) if number.isdecimal() else 0


def _hashed(paths: list[Path]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = list(pool.map(_hash, paths))
    return {
        path.name: {"bytes": path.stat().st_size, "xxh3": digest} for path, digest in zip(paths, hashes, strict=True)
    }


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _complaint(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it can."""
    try:
        record = read_json(checkpoint / _RECORD)
        files = {name: (entry["bytes"], entry["xxh3"]) for name, entry in record["files"].items()}
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
        for name, size in sizes.items():
            if size != files[name][0]:
                return f"{name} has {size:,} bytes instead of {files[name][0]:,}"
        hashes = {name: entry["xxh3"] for name, entry in _hashed([checkpoint / name for name in files]).items()}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (DataError, KeyError, TypeError, AttributeError):
        return f"{_RECORD} is missing or damaged"
    damaged = [name for name, digest in hashes.items() if digest != files[name][1]]
    if damaged:
        return f"{damaged[0]} is damaged (its content has another hash)"
    return None if record["progress"].get("step") == _step(checkpoint) else "its name and its record disagree"


def _checkpoints(folder: Path) -> list[Path]:
    """What looks like a checkpoint, oldest first."""
    parent = folder / CHECKPOINTS
    found = [path for path in parent.glob(f"{_PREFIX}*") if path.is_dir()] if parent.is_dir() else []
    return sorted(found, key=lambda path: (_step(path), path.name))


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isascii() and number.isdecimal() else -1


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes all but the newest. Those of later steps were damaged when the run went back to an earlier one."""
    numbered = [checkpoint for checkpoint in _checkpoints(folder) if _step(checkpoint) >= 0]
    until_now = [checkpoint for checkpoint in numbered if _step(checkpoint) <= step]
    for checkpoint in numbered:
        if checkpoint not in until_now[-keep:]:
            _remove(checkpoint)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _why_not_written(error: BaseException) -> str | None:
    """What a storage said, in a line; None where the error is of another kind."""
    from safetensors import SafetensorError

    if isinstance(error, ConnectionError):
        return None
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({Path(error.filename).name})" if error.filename else error.strerror
    if _NOT_WRITTEN.search(str(error)):
        return "the disk is full, or failed in another way"
    return _first_line(error) if isinstance(error, OSError | DataError | SafetensorError) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
