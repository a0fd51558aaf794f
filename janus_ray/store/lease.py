"""Who may write into a folder: one process at a time, by a file system's lock or, elsewhere, by the owner's file.

A local file system keeps a lock for as long as the process that took it lives. Where there is none that every machine
respects (an object storage, a network file system) the owner is named by numbered files. To own the folder is to have
made the highest number, which of several that try only one can, because the storage makes a file only where there is
none. The owner gives a sign of life by writing its file again; who has given none for long may be followed by the next
number, and finds out before it commits anything that counts. Ages are differences of the storage's own times: no
machine's clock matters. The two highest numbers are never deleted, so an old owner that wakes up never takes itself for
the present one, and a listing that is a moment old leads to a number that is taken.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from upath import UPath

from janus_ray.errors import ConfigError, DataError
from janus_ray.store.files import create, delete_files, files_below, read_bytes, what_is_at, write_bytes
from janus_ray.store.fingerprint import LOCK
from janus_ray.store.location import is_local, one_line_errors
from janus_ray.store.log import after_the_flush

# Longer than the retries of a storage in trouble, and short enough to wait for after a kill on another machine.
_STALE_S = 60.0
# Several signs of life may fail before an owner counts as gone.
_BEAT_S = 10.0
_OWNER, _ENDING = ".owner-", ".json"
_PROBE = ".probe-"
# File systems of one machine; of any other it is not sure that another machine sees our lock.
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "ceph",
    "lustre",
    "gluster",
    "beegfs",
    "gpfs",
    "afs",
    "vboxsf",
    "virtiofs",
)


def is_lease_file(name: str) -> bool:
    """Whether a file of a folder is ours and says who writes there."""
    return name == LOCK or name.startswith((_OWNER, _PROBE))


def take_lease(folder: UPath) -> FileLock | Lease:
    """Makes this process the only one that writes into the folder, until it ends or lets go.

    Raises:
        ConfigError: another process writes there.
        DataError, OSError: the folder cannot be written.
    """
    key = str(folder.resolve()) if is_local(folder) else str(folder)
    # The same process may begin again what it left unfinished.
    if (held := _held.pop(key, None)) is not None:
        held.release()
    lease = None
    if is_local(folder) and not _on_network(folder):
        lease = FileLock.taken(folder)
    _held[key] = lease = lease or Lease.taken(folder)
    return lease


class FileLock:
    """The lock of a file system of this machine; it ends with the process, however that ends."""

    def __init__(self, stream: IO[str]) -> None:
        """Keeps the open file that carries the lock."""
        self._stream = stream

    @classmethod
    def taken(cls, folder: Path) -> FileLock | None:
        """The lock; None where the file system has no locks.

        Raises:
            ConfigError: another process holds it.
        """
        stream = (folder / LOCK).open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ConfigError(f"output folder {folder}: another run is writing there at the moment") from None
        except OSError as error:
            stream.close()
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return None
            raise
        return cls(stream)

    def check(self) -> None:
        """A lock is not lost while its process lives."""

    def release(self) -> None:
        """Lets another process write there."""
        self._stream.close()


class _Owner(NamedTuple):
    number: int
    file: UPath
    content: dict[str, Any]

    @property
    def who(self) -> str:
        return f"process {self.content.get('pid')} on {self.content.get('host')}"


class Lease:
    """The owner's file of a folder, and the thread that gives its signs of life."""

    def __init__(self, folder: UPath, number: int) -> None:
        """Prepares the ownership of that number; `taken` makes it."""
        self._folder = folder
        self._number = number
        self._content = {"token": uuid.uuid4().hex, **_this_process()}
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {folder}", daemon=True)

    @classmethod
    def taken(cls, folder: UPath) -> Lease:
        """The folder's ownership.

        Raises:
            ConfigError: another process has it, or is a moment faster.
        """
        before = _owners(folder)
        if before and not _is_free(owner := before[-1], folder):
            raise ConfigError(
                f"output folder {folder}: another run is writing there at the moment ({owner.who}); a run that was "
                f"killed frees the folder {_STALE_S:.0f} s after its last sign of life"
            )
        lease = cls(folder, before[-1].number + 1 if before else 1)
        made = create(lease._file, lease._bytes())
        # Where a storage makes files without looking, the last one wins, and reads its own words.
        ours = made and _content(lease._file).get("token") == lease._content["token"]
        # A listing may miss both the number that another process made meanwhile and the lower one that it took away.
        if not ours or lease._look():
            raise ConfigError(f"output folder {folder}: another run has begun to write there just now")
        # Tidying only: what is lower counts no more.
        with suppress(DataError):
            delete_files([found for found in files_below(folder, deep=False) if lease._is_outlived(found.name)])
        lease._thread.start()
        return lease

    def _is_outlived(self, name: str) -> bool:
        # The number before ours stays: who lists the folder while we write sees that one or ours, never none.
        return name.startswith(_PROBE) or (_number(name) or self._number) < self._number - 1

    @property
    def _file(self) -> UPath:
        return self._folder / f"{_OWNER}{self._number:06d}{_ENDING}"

    def _bytes(self) -> bytes:
        return json.dumps(self._content).encode()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            # A storage in trouble is no loss; who asks is told then.
            with suppress(DataError):
                if self._look():
                    return
                write_bytes(self._file, self._bytes())

    def _look(self) -> str | None:
        """Who has taken the folder since; None while it is ours."""
        if self._lost is None and (latest := _owners(self._folder)) and latest[-1].number > self._number:
            self._lost = latest[-1].who
        return self._lost

    def check(self) -> None:
        """Makes sure, by asking the storage, that the folder is still ours.

        Raises:
            DataError: another process has taken it while this one gave no sign of life.
        """
        if other := self._look():
            raise DataError(
                f"output folder {self._folder}: {other} has taken it over, because this run gave no sign of life for "
                f"{_STALE_S:.0f} s; what that one writes counts"
            )

    def release(self) -> None:
        """Lets another process write there at once."""
        self._ended.set()
        self._thread.join(_BEAT_S)
        self._content["released"] = True
        # What cannot be said now is known in a minute.
        with suppress(DataError):
            if not self._look():
                write_bytes(self._file, self._bytes())


# What this process holds, by folder.
_held: dict[str, FileLock | Lease] = {}


def release_all() -> None:
    """Lets go of every folder; for the end of a process."""
    while _held:
        _held.popitem()[1].release()


# Who comes next reads what the logs hold.
after_the_flush(release_all)


def _on_network(folder: Path) -> bool:
    """Whether a folder lies on a file system that other machines may see."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds: dict[str, str] = {}
    for line in mounts:
        before, _, after = line.partition(" - ")
        # The later mount hides the earlier one.
        kinds[before.split(" ")[4].replace("\\040", " ")] = after.split(" ")[0]
    real = folder.resolve()
    kind = next((kinds[str(parent)] for parent in (real, *real.parents) if str(parent) in kinds), "")
    return kind.startswith(_NETWORK)


def _owners(folder: UPath) -> list[_Owner]:
    """The owners' files, the present owner's last."""
    while True:
        found = [(number, each.where) for each in files_below(folder, deep=False) if (number := _number(each.name))]
        found.sort(key=lambda each: each[0])
        try:
            return [_Owner(number, file, _content(file) if number == found[-1][0] else {}) for number, file in found]
        except DataError:
            # Removed since it was listed: there is a higher number by now.
            if what_is_at(found[-1][1]) is not None:
                raise


def _number(name: str) -> int | None:
    digits = name.removeprefix(_OWNER).removesuffix(_ENDING)
    return int(digits) if name == f"{_OWNER}{digits}{_ENDING}" and digits.isdecimal() else None


def _content(file: UPath) -> dict[str, Any]:
    """What an owner wrote; nothing where it is just being written."""
    written = read_bytes(file)
    try:
        content = json.loads(written)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_free(owner: _Owner, folder: UPath) -> bool:
    if owner.content.get("released"):
        return True
    here = _this_process()
    if all(owner.content.get(name) == here[name] for name in ("host", "boot", "namespace")):
        return _started(owner.content.get("pid")) != owner.content.get("started")
    return _age_s(owner, folder) > _STALE_S


def _age_s(owner: _Owner, folder: UPath) -> float:
    """Seconds since the owner's last sign of life, by the storage's clock."""
    probe = folder / f"{_PROBE}{uuid.uuid4().hex}"
    write_bytes(probe, b"")
    try:
        with one_line_errors(folder):
            age_s = _modified_s(probe) - _modified_s(owner.file)
    except DataError:
        if what_is_at(owner.file) is not None:
            raise
        # Followed by another one just now.
        age_s = 0.0
    with suppress(DataError):
        delete_files([found for found in files_below(folder, deep=False) if found.name == probe.name])
    return age_s


def _modified_s(file: UPath) -> float:
    if is_local(file):
        return file.stat().st_mtime
    return file.fs.modified(file.path).timestamp()


def _this_process() -> dict[str, Any]:
    """What tells this process from every other one, on this machine or another."""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: object) -> str | None:
    """When a process of this machine was started; None where it is no more. Numbers of processes are used again."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""
