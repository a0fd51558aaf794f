"""The ledger: every finished request, on disk before its row moves on, so that nothing is paid twice.

One append-only JSONL file per client process, written line by line. A process killed in the middle of a line leaves
a torn last line, which is skipped, as is any line that is not a record. All files of the folder are read together; a
success hides earlier errors. Errors are not answered from the ledger, a rerun tries them again; only those that the
same request is sure to meet again (request.FINAL_KINDS) are.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from janus_ray.errors import DataError
from janus_ray.llm.request import FINAL_KINDS, Completion, ErrorKind, Usage
from janus_ray.records import Status

# Strict: a line of another shape is no record of ours, whatever could be made of it.
_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Tokens(BaseModel):
    model_config = ConfigDict(strict=True)

    prompt_tokens: _Count
    completion_tokens: _Count


class _Line(BaseModel):
    """One line of a ledger file."""

    model_config = ConfigDict(strict=True)

    key: str
    status: Status
    text: str
    finish_reason: Literal["stop", "length"] | None
    error_kind: ErrorKind | None
    error_message: str | None
    attempts: _Count
    usage: _Tokens
    sent: _Count


class Ledger:
    """Reads what earlier runs finished, appends what this one does."""

    def __init__(self, folder: Path | str) -> None:
        """Loads the folder; the file for appending is made with the first record.

        Raises:
            DataError: a file of the folder cannot be read.
        """
        self._folder = Path(folder)
        self._done: dict[str, Completion] = {}
        self.skipped = 0
        """Lines that are no records."""
        for record in _records(self._folder):
            if record is None:
                self.skipped += 1
            else:
                self._keep(*record)
        self._file: int | None = None
        self._failed: DataError | None = None
        self._path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"

    def __len__(self) -> int:
        """Number of requests answered successfully so far."""
        return sum(completion.status == "ok" for completion in self._done.values())

    def get(self, key: str) -> Completion | None:
        """The outcome recorded for a key, if it needs no further request.

        Raises:
            DataError: a record could not be written: nothing more should be paid for.
        """
        found = self._done.get(key)
        if found is None and self._failed:
            raise self._failed
        return found.from_ledger() if found else None

    def record(self, key: str, completion: Completion) -> None:
        """Appends an outcome and hands it to the operating system; a killed process loses nothing.

        Raises:
            DataError: it cannot be written. What was recorded before stays readable.
        """
        line = json.dumps({"key": key, **asdict(completion)}, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            _append(self._file, line)
        except OSError as error:
            self._failed = DataError(
                f"{self._path}: an answer cannot be recorded: {error.strerror}; make room there, then run again with "
                "--if-exists resume: what was recorded is not asked for again"
            )
            raise self._failed from None
        self._keep(key, completion)

    def _keep(self, key: str, completion: Completion) -> None:
        if completion.status == "ok" or (completion.error_kind in FINAL_KINDS and key not in self._done):
            self._done[key] = completion


def count_finished(folder: Path | str) -> int:
    """Number of distinct requests with a successful outcome in a ledger folder."""
    return len(Ledger(folder))


def _append(file: int, line: bytes) -> None:
    """Writes a whole line or, where there is no room for it, none of it."""
    end = os.fstat(file).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
    except OSError:
        # A torn line would swallow the next one.
        os.ftruncate(file, end)
        raise


def _records(folder: Path) -> Iterator[tuple[str, Completion] | None]:
    """Every line of every file; None for one that is no record."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            with path.open("rb") as stream:
                for line in stream:
                    yield _parse(line)
        except OSError as error:
            raise DataError(f"{path}: the ledger cannot be read: {error.strerror}") from None


def _parse(line: bytes) -> tuple[str, Completion] | None:
    try:
        record = _Line.model_validate_json(line)
    except ValidationError:
        return None
    if (record.error_kind is None) != (record.status == "ok"):
        return None
    usage = Usage(record.usage.prompt_tokens, record.usage.completion_tokens)
    fields = {name: getattr(record, name) for name in _Line.model_fields if name not in ("key", "usage")}
    return record.key, Completion(**fields, usage=usage)
