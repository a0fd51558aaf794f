"""PyTorch's distributed checkpoints on any location: each rank's file goes straight there, and is hashed on the way."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

import xxhash
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import StorageMeta
from upath import UPath

from janus_ray.store.location import is_local, location


class CheckpointWriter(FileSystemWriter):
    """Writes below one folder; `written` says of each file of this rank its size and hash."""

    def __init__(self, folder: UPath) -> None:
        """Nothing is written yet."""
        super().__init__(str(folder), sync_files=is_local(folder))
        # Replaced, as PyTorch's own class for other file systems does it.
        self.fs = self._files = _Files()
        self.path = folder

    @property
    def written(self) -> dict[str, dict[str, Any]]:
        """By name: bytes and xxh3."""
        return self._files.written

    def storage_meta(self) -> StorageMeta:
        """What goes into the metadata: not where the folder lies, because it may be moved."""
        return StorageMeta(save_id=self.save_id)


class CheckpointReader(FileSystemReader):
    """Reads what a `CheckpointWriter` wrote, wherever it lies by then."""

    def __init__(self, folder: UPath) -> None:
        """Nothing is read yet."""
        super().__init__(str(folder))
        self.fs = _Files()
        self.path = folder


class _Files(FileSystemBase):
    """PyTorch's idea of a file system on our locations."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any]:
        with path.open(mode) as stream:
            hashed = _Hashed(stream) if "w" in mode else stream
            yield hashed
        if isinstance(hashed, _Hashed):
            self.written[path.name] = {"bytes": hashed.size_bytes, "xxh3": hashed.digest.hexdigest()}

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return location(path)

    def rename(self, path: Any, new_path: Any) -> None:
        if is_local(path):
            path.rename(new_path)
        else:
            path.fs.mv(path.path, new_path.path)
        self.written[new_path.name] = self.written.pop(path.name)

    def mkdir(self, path: Any) -> None:
        if is_local(path):
            path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return path.exists()

    def rm_file(self, path: Any) -> None:
        path.unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, UPath)


class _Hashed(io.BufferedIOBase):
    """A stream that is written from its beginning to its end, and hashed meanwhile."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = xxhash.xxh3_128()
        self.size_bytes = 0

    def write(self, content: Any) -> int:
        self._stream.write(content)
        self.digest.update(content)
        self.size_bytes += memoryview(content).nbytes
        return memoryview(content).nbytes

    def tell(self) -> int:
        return self.size_bytes

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
