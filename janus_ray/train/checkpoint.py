"""Checkpoints of a run: each whole or absent, found by looking into the folder and by no list that someone keeps.

A checkpoint is a folder `checkpoints/checkpoint_<step>`. Every worker writes its part straight into it, into a folder
of this start of the workers, and when all parts lie there a record of their sizes and hashes is written last: without
the record there is no checkpoint, so that a killed or failed save leaves nothing that could be taken for one; what was
damaged later shows in the record. Nothing in it knows where the folder lies.

A save copies the state to the CPU and returns; the rest is done by a thread while training goes on.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from upath import UPath

from janus_ray.errors import CheckpointError, DataError, JanusError
from janus_ray.store.files import Found, delete_files, files_below, read_json, write_json
from janus_ray.store.location import is_local, location, os_reason, storage_errors
from janus_ray.train.checkpoint_storage import CheckpointReader, CheckpointWriter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHECKPOINTS = "checkpoints"
_PREFIX = "checkpoint_"
_RECORD = "checkpoint.json"
_CHUNK = 1 << 24
# How PyTorch's stream writer answers a full disk.
_NOT_WRITTEN = re.compile("PytorchStreamWriter|inline_container|unexpected pos")


class Checkpoints:
    """Writes the checkpoints of one start of the workers, one at a time. All ranks make one and call the same."""

    write_s: float | None = None
    """How long the newest one took to write, in the background."""

    def __init__(self, folder: Path | UPath, keep: int) -> None:
        """Agrees with the other ranks on a name.

        Args:
            folder: the run's folder, which all ranks see.
            keep: how many checkpoints stay, the newest included.
        """
        self._folder, self._keep = location(folder), keep
        # Of its own, so that what the thread says to the other ranks does not mix with what training says to them.
        self._group = dist.new_group(backend="gloo")
        # Where an earlier start still writes, on a machine that was cut off, it does not write into our files.
        names = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(names, src=0, group=self._group)
        self._start = names[0]
        self._writing: Future[None] | None = None

    def save(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]) -> None:
        """Copies the state, once the save before is through, and writes it in the background.

        Args:
            model: the sharded model.
            optimizer: its optimizer.
            progress: what else a resume needs, JSON-ready; "step" is the number of finished steps.

        Raises:
            CheckpointError: the one before could not be written; the older ones stay.
        """
        self.wait()
        weights, optimizer_state = get_state_dict(model, optimizer)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied: Any = stager.stage({"model": weights, "optimizer": optimizer_state})
        stager.close()
        self._writing = _in_a_thread(lambda: self._write(copied, dict(progress)))

    def wait(self) -> None:
        """Returns when the newest checkpoint is complete.

        Raises:
            CheckpointError: it could not be written, on every rank.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        # What we raise comes on every rank, and what it says of the newest checkpoint has to be true.
        if error is None or isinstance(error, JanusError):
            self.wait()

    def _write(self, state: dict[str, Any], progress: dict[str, Any]) -> None:
        began = time.monotonic()
        target = self._folder / CHECKPOINTS / f"{_PREFIX}{progress['step']:08d}"
        writer = CheckpointWriter(target / self._start)
        with named_when_not_written(target):
            try:
                dcp.save(state, storage_writer=writer, process_group=self._group)
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, writer.written, group=self._group)
                files = {f"{self._start}/{name}": entry for each in gathered for name, entry in sorted(each.items())}
                self._finish(target, {"progress": progress, "files": files})
            except BaseException:
                _remove_all(target, below=f"{self._start}/")
                raise
        self.write_s = time.monotonic() - began

    def _finish(self, target: UPath, record: dict[str, Any]) -> None:
        """Rank 0 writes the record and removes what is older; all ranks learn how that went.

        Raises:
            DataError: it could not be written.
        """
        outcome: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                write_json(target / _RECORD, record)
                _prune(self._folder, record["progress"]["step"], self._keep)
            except DataError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise DataError(outcome[0])


def load_checkpoint(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path | UPath, expected: Mapping[str, Any]
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
    checkpoint = location(checkpoint)
    record = read_json(checkpoint / _RECORD)
    progress = record["progress"]
    for name, value in expected.items():
        if name != "step" and progress.get(name) != value:
            raise CheckpointError(f"checkpoint {checkpoint}: made with another {name}; it cannot continue this run")
    weights, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": optimizer_state}
    start = next(iter(record["files"])).partition("/")[0]
    try:
        dcp.load(state, storage_reader=CheckpointReader(checkpoint / start))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise CheckpointError(f"checkpoint {checkpoint}: does not fit this model: {_first_line(causes[0])}") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return progress


def newest_healthy(folder: Path | UPath) -> tuple[UPath | None, list[str]]:
    """The newest checkpoint whose files are what its record says, and one line for each newer one that is not.

    On a file system it reads every byte of the checkpoints that it looks at. An object storage, which has an object
    whole or not at all and keeps checksums itself, is asked for names and sizes only.
    """
    complaints = []
    for name, files in reversed(_checkpoints(folder).items()):
        checkpoint = location(folder) / CHECKPOINTS / name
        complaint = _complaint(checkpoint, files)
        if complaint is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint}: {complaint}")
    return None, complaints


def progress_of(checkpoint: Path | UPath) -> dict[str, Any]:
    """What a checkpoint's record says of the run: "step", "loss" and what else was saved with it."""
    return read_json(location(checkpoint) / _RECORD)["progress"]


def remove_leftovers(folder: Path | UPath) -> None:
    """Removes what killed writes left behind; no other process may be writing in the folder.

    What a killed save left goes with the next checkpoint that is complete.
    """
    folder = location(folder)
    # Of the workers' own files: the driver, which calls this, may be writing others at the same moment.
    ours = [found for found in files_below(folder, deep=False) if found.name.startswith(".metrics.jsonl.")]
    found = [*ours, *files_below(folder / "documents", deep=False)]
    delete_files(file for file in found if file.name.startswith(".") and file.name.endswith(".tmp"))


@contextmanager
def named_when_not_written(target: Path | UPath) -> Generator[None]:
    """Turns what libraries raise when a storage is full, read-only or refuses us into one line that names the target.

    Raises:
        CheckpointError: the block could not write.
    """
    try:
        yield
    except (*storage_errors(), DataError, RuntimeError, SafetensorError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = next(filter(None, (_why_not_written(cause, target) for cause in causes)), None)
        if reason is None:
            # Not the storage: another worker died, say.
            raise
        raise CheckpointError(
            f"{target} cannot be written: {reason}; what was saved before is kept: once this is mended, "
            "--if-exists resume continues from there"
        ) from None


def _in_a_thread(act: Any) -> Future[None]:
    """Like an executor, but a daemon: what waits for a dead rank must not keep this process."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            act()
        # Raised again where the result is asked for.
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _complaint(checkpoint: UPath, files: Mapping[str, Found]) -> str | None:
    """Why a checkpoint cannot be used; None where it can."""
    if _RECORD not in files:
        return f"it was never finished, or {_RECORD} is missing"
    try:
        record = read_json(checkpoint / _RECORD)
        expected = {name: (entry["bytes"], entry["xxh3"]) for name, entry in record["files"].items()}
        step = record["progress"].get("step")
    except (DataError, KeyError, TypeError, AttributeError):
        return f"{_RECORD} is missing or damaged"
    if not expected or step != _step(checkpoint.name):
        return "its name and its record disagree"
    for name, (size, _) in expected.items():
        if name not in files:
            return f"{name} is missing"
        if files[name].size_bytes != size:
            return f"{name} has {files[name].size_bytes:,} bytes instead of {size:,}"
    if not is_local(checkpoint):
        return None
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            hashes = dict(zip(expected, pool.map(lambda name: _hash(checkpoint / name), expected), strict=True))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    damaged = [name for name, digest in hashes.items() if digest != expected[name][1]]
    return f"{damaged[0]} is damaged (its content has another hash)" if damaged else None


def _hash(path: UPath) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checkpoints(folder: Path | UPath) -> dict[str, dict[str, Found]]:
    """What looks like a checkpoint, oldest first: its files by their names in it."""
    found: dict[str, dict[str, Found]] = {}
    for file in files_below(location(folder) / CHECKPOINTS):
        name, _, inner = file.name.partition("/")
        if inner and name.startswith(_PREFIX):
            found.setdefault(name, {})[inner] = file
    return dict(sorted(found.items(), key=lambda item: (_step(item[0]), item[0])))


def _step(name: str) -> int:
    number = name.removeprefix(_PREFIX)
    return int(number) if number.isascii() and number.isdecimal() else -1


def _prune(folder: UPath, step: int, keep: int) -> None:
    """Leaves the newest. Later steps were damaged when the run went back; of killed saves nothing stays."""
    numbered = {name: files for name, files in _checkpoints(folder).items() if _step(name) >= 0}
    complete = [name for name, files in numbered.items() if _RECORD in files and _step(name) <= step]
    kept = complete[-keep:]
    for name, files in numbered.items():
        target = folder / CHECKPOINTS / name
        if name not in kept:
            _remove(target, files)
        elif _step(name) == step:
            # An earlier save of this step, which was damaged.
            named = read_json(target / _RECORD)["files"]
            _remove(target, {inner: file for inner, file in files.items() if inner != _RECORD and inner not in named})


def _remove_all(target: UPath, below: str) -> None:
    """Removes what a failed save wrote; whatever hinders that is not what is to be said."""
    try:
        files = files_below(target)
        _remove(target, {file.name: file for file in files if file.name.startswith(below)})
    except DataError:
        return


def _remove(target: UPath, files: Mapping[str, Found]) -> None:
    """Removes files of a checkpoint, its record first: half removed, it counts no more."""
    delete_files(file for name, file in sorted(files.items(), key=lambda item: item[0] != _RECORD))
    if is_local(target):
        for empty in sorted({target, *(file.where.parent for file in files.values())}, reverse=True):
            try:
                empty.rmdir()
            except OSError:
                # Something else lies in it.
                continue


def _why_not_written(error: BaseException, target: Path | UPath) -> str | None:
    """What a storage said, in a line; None where the error is of another kind."""
    if isinstance(error, ConnectionError) and is_local(location(target)):
        return None
    if isinstance(error, OSError) and error.strerror and is_local(location(target)):
        return f"{error.strerror} ({Path(error.filename).name})" if error.filename else error.strerror
    if _NOT_WRITTEN.search(str(error)):
        return "the disk is full, or failed in another way"
    if isinstance(error, DataError | SafetensorError):
        return _first_line(error)
    return os_reason(error, target) if isinstance(error, storage_errors()) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
